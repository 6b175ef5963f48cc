"""pixel2style2pixel (arXiv:2008.00951) as a PyTorch Lightning library with Hydra configs.

Importing this package imports nothing heavy: `PSP` is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psp_lightning.utils import compat

if TYPE_CHECKING:
    from psp_lightning.models.psp import PSP as PSP

__version__ = "0.1.0"
__all__ = ["PSP", "__version__"]

compat.register_old_modules()


def __getattr__(name: str) -> Any:
    if name == "PSP":
        from psp_lightning.models.psp import PSP

        return PSP
    raise AttributeError(f"module 'psp_lightning' has no attribute '{name}'")

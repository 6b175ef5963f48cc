"""pixel2style2pixel (arXiv:2008.00951) as a PyTorch Lightning library with Hydra configs.

Importing this package imports nothing heavy: its names are loaded at their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psp_lightning.models.psp import PSP as PSP
    from psp_lightning.utils.reproducibility import make_reproducible as make_reproducible

__version__ = "0.1.0"
__all__ = ["PSP", "__version__", "make_reproducible"]


def __getattr__(name: str) -> Any:
    if name == "PSP":
        from psp_lightning.models.psp import PSP

        return PSP
    if name == "make_reproducible":
        from psp_lightning.utils.reproducibility import make_reproducible

        return make_reproducible
    raise AttributeError(f"module 'psp_lightning' has no attribute '{name}'")

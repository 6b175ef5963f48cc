"""pixel2style2pixel (arXiv:2008.00951) as a PyTorch Lightning library with Hydra configs.

Importing this package is cheap: each public name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from psp_lightning.utils import compat

if TYPE_CHECKING:
    from psp_lightning.build.from_python import fit as fit
    from psp_lightning.data.spec import InputSpec as InputSpec
    from psp_lightning.data.toyfaces import ToyFaces as ToyFaces
    from psp_lightning.latents.codes import Latents as Latents
    from psp_lightning.losses.base import register_loss as register_loss
    from psp_lightning.metrics.registry import register_metric as register_metric
    from psp_lightning.models.psp import PSP as PSP
    from psp_lightning.models.registry import register_encoder as register_encoder
    from psp_lightning.models.registry import register_generator as register_generator
    from psp_lightning.utils.reproducibility import make_reproducible as make_reproducible

__version__ = "0.1.0"

_MODULES = {
    "PSP": "models.psp",
    "fit": "build.from_python",
    "InputSpec": "data.spec",
    "Latents": "latents.codes",
    "ToyFaces": "data.toyfaces",
    "register_encoder": "models.registry",
    "register_generator": "models.registry",
    "register_loss": "losses.base",
    "register_metric": "metrics.registry",
    "make_reproducible": "utils.reproducibility",
}
__all__ = ["__version__", *_MODULES]

compat.register_old_modules()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'psp_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(f"psp_lightning.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

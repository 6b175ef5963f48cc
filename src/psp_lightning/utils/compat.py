"""What version 0.1.0 called otherwise, in one table.

Modules and names that its documentation showed can still be imported, with a `DeprecationWarning` that says the new
path. Keys of its files are renamed when they are read, without a warning.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "psp_lightning."

# Module of 0.1.0 -> the modules that hold its names now, searched in this order.
MODULES = {
    "checkpoints.io": ("loading", "checkpoints.read", "checkpoints.strict"),
    "checkpoints.latents": ("latents.codes", "loading"),
    "checkpoints.latent_files": ("latents.files",),
    "checkpoints.networks": ("checkpoints.weight_files", "loading"),
    "checkpoints.pretrained": ("zoo.locate",),
    "lit.grids": ("data.spec", "lit.callbacks.image_grids"),
    "lit.module": ("lit.psp",),
    "lit.samples": ("lit.callbacks.samples",),
    "models.frozen": ("models.layers",),
}
# Name of 0.1.0 -> its name now. A module that still exists calls `moved` in its `__getattr__`; one that is gone needs a
# line in MODULES too.
NAMES = {
    "checkpoints.io.save_atomic": "utils.atomic.save_torch",
    "checkpoints.latents.generator_hash": "checkpoints.weight_files.generator_hash",
    "data.stores.View": "data.stores.PairLayout",
    "data.transforms.load_source": "data.spec.load_source",
}
# Prefix of a state dict's keys -> its prefix now.
STATE_KEYS = {"average.": "g_ema."}  # of LitGenerator
# Class that a file names -> its name now.
CLASSES = {"FaceEmbedding": "ToyFaceEmbedding"}
# Override that a run recorded -> what says the same now.
OVERRIDES = {
    f"callbacks.export={value}": "callbacks.export.every_n_steps=null" for value in ("null", "false", "False", "")
}
# Module of 0.1.0 that has left the package -> what replaces it.
REMOVED = {"checkpoints.release": "Run `python -m benchmarks.toyfaces.records FOLDER` in the repository."}


def moved(module: str, name: str) -> Any:
    """Return what `module.name` of version 0.1.0 is now, with a warning that says where.

    Raises:
        AttributeError: version 0.1.0 had no such name there, or it is gone.
    """
    old = f"{module}.{name}".removeprefix(PACKAGE)
    places = [f"{place}.{name}" for place in MODULES.get(module.removeprefix(PACKAGE), ())]
    for place in [NAMES[old]] if old in NAMES else places:
        target, _, attribute = place.rpartition(".")
        if not name.startswith("__") and hasattr(found := importlib.import_module(PACKAGE + target), attribute):
            warn_moved(f"{PACKAGE}{old}", f"{PACKAGE}{place}", stacklevel=4)
            return getattr(found, attribute)
    raise AttributeError(f"module '{module}' has no attribute '{name}'")


def warn_moved(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn whoever uses the name `old`."""
    warnings.warn(f"{old} is now {new}; the old name will go.", DeprecationWarning, stacklevel)


def rename_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of version 0.1.0, or of this one, with today's keys."""
    renamed = {}
    for key, value in state.items():
        old = next((prefix for prefix in STATE_KEYS if key.startswith(prefix)), "")
        renamed[STATE_KEYS.get(old, "") + key.removeprefix(old)] = value
    return renamed


class _OldModules(MetaPathFinder, Loader):
    """Finds the modules of `MODULES`: empty ones, whose names `moved` looks up."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(PACKAGE) if fullname.startswith(PACKAGE) else ""
        if old in REMOVED:
            raise ModuleNotFoundError(f"{fullname} is no longer part of the package. {REMOVED[old]}", name=fullname)
        return ModuleSpec(fullname, self) if old in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: moved(module.__name__, name)  # type: ignore[method-assign]


def register_old_modules() -> None:
    """Let the import system find the modules of `MODULES`; it asks only when it has found no other."""
    if not any(type(finder).__qualname__ == _OldModules.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())

"""The user's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from psp_lightning.utils.errors import UserError


def cache_dir(variable: str) -> Path:
    """Return the folder `psp_lightning` in the user's cache; it may not exist yet.

    Raises:
        UserError: the user has no home folder; `variable` is the environment variable that names another folder.
    """
    try:
        if sys.platform == "darwin":
            cache = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise UserError(f"This user has no home folder (HOME is not set): set {variable} to a folder.") from None
    return cache / "psp_lightning"

"""The place of the shipped configuration: inside the wheel, or beside `src` in a source tree."""

from __future__ import annotations

import os
from pathlib import Path


def config_root() -> str:
    """Return the absolute path of the folder with `train.yaml`.

    Raises:
        FileNotFoundError: the installation lacks its configuration files.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "train.yaml").is_file():
            return os.fspath(candidate)
    raise FileNotFoundError(f"psp_lightning's configuration files are missing beside {package}; reinstall the package")

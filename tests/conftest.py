"""Products that repeat bit for bit, and fixtures shared by all tests: the drawing rules and reference values of
tests/golden, the photos."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from psp_lightning import make_reproducible

HERE = Path(__file__).parent

make_reproducible()  # before the first product of any test, whichever tests run


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """golden.py: draws weights and inputs from their names."""
    spec = importlib.util.spec_from_file_location("golden", HERE / "golden" / "golden.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """The values that the reference implementation (commit 5cfff38) gave for them."""
    with np.load(HERE / "golden" / "reference_values.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def photos() -> Path:
    return HERE / "data" / "photos"

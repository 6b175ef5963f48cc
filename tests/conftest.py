"""Make products repeat bit for bit, and provide fixtures for all tests: the drawing rules and reference values of
tests/golden, and the photos."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from psp_lightning import make_reproducible
from psp_lightning.data.toyfaces import write_dataset
from psp_lightning.ops.dispatch import registered

HERE = Path(__file__).parent

make_reproducible()  # before any test computes a product


def pytest_configure(config: pytest.Config) -> None:
    """Make test workers and their child processes use one thread each.

    More threads than cores would wait for each other and take several times as long.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-kernels", action="store_true", help="every combination of the kernels' test matrix, not every pair"
    )


class FakeKernels:
    """Kernels that compute nothing and record how they are called."""

    def __init__(self) -> None:
        self.epilogues: list[tuple[Tensor, Tensor | None]] = []  # x, and fy if the filter is fused

    def epilogue(self, out: Tensor, x: Tensor, fy: Tensor | None, *_: object) -> None:
        self.epilogues.append((x, fy))
        out.zero_()

    def upfirdn2d(self, out: Tensor, *_: object) -> None:
        out.zero_()


@pytest.fixture
def fake_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    """Send calls of the ops to these kernels, as if the CPU were a GPU."""
    fake = FakeKernels()
    for name in ("upfirdn2d", "epilogue"):  # by module: the package has functions of these names
        monkeypatch.setattr(importlib.import_module(f"psp_lightning.ops.{name}"), "kernels_for", lambda x: fake)
    with registered():
        yield fake


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """Import golden.py, which draws weights and inputs from their names."""
    spec = importlib.util.spec_from_file_location("golden", HERE / "golden" / "golden.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """Load the values that the reference implementation (commit 5cfff38) computed for them."""
    with np.load(HERE / "golden" / "reference_values.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def photos() -> Path:
    return HERE / "data" / "photos"


@pytest.fixture(scope="session")
def is_frozen() -> Callable[[nn.Module], bool]:
    """Return a check: a module stays in eval mode after `.train()`, and none of its parameters requires a gradient."""

    def check(module: nn.Module) -> bool:
        module.train()
        return not any(part.training for part in module.modules()) and not any(
            p.requires_grad for p in module.parameters()
        )

    return check


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 drawn faces of 64 px with their label maps and sketches; copy it before changing it."""
    return write_dataset(tmp_path_factory.mktemp("drawn") / "faces", n=24, size=64, seed=3, progress=False)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Compute convolutions and products of float32 on a GPU without TensorFloat-32, which has 11 bits of mantissa."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept

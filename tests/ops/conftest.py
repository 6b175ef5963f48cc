"""Fixtures that run the kernels on a GPU, or on the CPU thread by thread (`host/launch.cpp`)."""

from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from psp_lightning.ops import dispatch as _dispatch
from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.cuda import toolchain as _toolchain


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the cases of each kernel test that add a new pair of parameter values."""
    if config.getoption("--all-kernels"):
        return
    seen: dict[object, set[object]] = {}
    left_out = []
    for item in items:
        if item.path.name != "test_kernels.py" or not hasattr(item, "callspec"):
            continue
        values = {name: str(value) for name, value in item.callspec.params.items()}
        known = seen.setdefault((item.function, values.pop("device", "")), set())  # type: ignore[attr-defined]
        pairs = set(itertools.combinations(sorted(values.items()), 2))
        if len(values) > 2 and pairs <= known:
            left_out.append(item)
        known |= pairs
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


HOST = Path(__file__).parent / "host"
BUILD = """
import sys
from torch.utils import cpp_extension
# an address that a GPU would reject, or an overflow, ends the process; the traceback names the test
traps = ["-fsanitize=alignment,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
cpp_extension.load("psp_lightning_host", sys.argv[3:], extra_include_paths=[sys.argv[1], sys.argv[2]],
    extra_cflags=["-O1", "-fno-strict-aliasing", *traps], build_directory=sys.argv[2], is_python_module=False,
    with_cuda=False)
"""


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile bindings.cpp and the threads' code for the CPU (about half a minute)."""
    if not _toolchain.compiler_version() or not _toolchain.ninja_version():
        pytest.skip("needs a C++ compiler and ninja")
    folder = tmp_path_factory.mktemp("host")
    for path in _toolchain.source_files():
        shutil.copy(path, folder)
    text = (folder / "bindings.cpp").read_text()
    assert "psp_lightning_cuda" in text and "x.is_cuda()" in text
    text = text.replace("psp_lightning_cuda", "psp_lightning_host").replace("x.is_cuda()", "true")
    (folder / "bindings.cpp").write_text(text)
    sources = [folder / "bindings.cpp", HOST / "launch.cpp"]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(HOST), str(folder), *map(str, sources)],
        env=_toolchain.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    torch.ops.load_library(str(folder / "psp_lightning_host.so"))
    return torch.ops.psp_lightning_host


@pytest.fixture(
    params=[
        pytest.param("host", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Return a device on which calls of the ops use the kernels."""
    if request.param == "cuda":
        assert _jit.kernels() is not None, "PSP_OPS=ref is set, or the build failed"
        yield torch.device("cuda")
        return
    host = request.getfixturevalue("host_kernels")
    for name in ("upfirdn2d", "epilogue"):  # by module path, because the package has functions with these names
        monkeypatch.setattr(importlib.import_module(f"psp_lightning.ops.{name}"), "kernels_for", lambda x: host)
    with _dispatch.registered():
        yield torch.device("cpu")

"""The complete build of the kernels with the real compiler for two architectures, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.cuda import toolchain as _toolchain

pytestmark = pytest.mark.skipif(bool(_toolchain.missing()), reason=f"no build here: {_toolchain.missing()}")

LOAD = """
import sys, torch
from psp_lightning.ops.cuda import build as _jit
from pathlib import Path
kernels = _jit.load(Path(sys.argv[1]))
for name in ("epilogue", "epilogue_backward", "upfirdn2d"):
    print(getattr(kernels, name).default._schema)
try:
    x = torch.zeros(2, 3)
    kernels.epilogue(x, x, None, None, [], None, None, None, None, 1.0, 1.0, -1.0)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_two_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build takes about half a minute on one core. Loading the library reveals missing symbols."""
    monkeypatch.setenv("PSP_OPS_DIR", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "1")
    library = _jit.ensure_built(["8.0", "9.0"])
    log = (library.parent / "build.log").read_text()
    assert "warning" not in log.lower().replace("userwarning", ""), log
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("psp_lightning_cuda::") == 3, done.stdout
    assert "expected a CUDA tensor" in done.stdout, done.stdout + done.stderr
    data = library.read_bytes()
    assert b"sm_80" in data and b"sm_90" in data, "machine code for an architecture is missing"


@pytest.mark.slow
def test_an_error_of_the_real_compiler_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass an unknown architecture to torch's build."""
    monkeypatch.setenv("PSP_OPS_DIR", str(tmp_path))
    with pytest.raises(_jit.BuildError, match="The compiler failed"):
        _jit.ensure_built(["1.0"])
    assert not list(tmp_path.rglob("*.so"))


def test_toolkit_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CUDA_HOME without compiler or headers does not count."""
    _toolchain.cuda_home.cache_clear()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    home = _toolchain.cuda_home()
    _toolchain.cuda_home.cache_clear()
    assert home is not None and home != tmp_path and (home / "include" / "cuda_runtime.h").is_file()
    assert _toolchain.nvcc_version(home).split(".")[0] == str(torch.version.cuda).split(".")[0]

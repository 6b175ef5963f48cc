"""Builds happen once, atomically and without hanging. The compiler in these tests is a few lines of Python."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import pytest
import torch

from psp_lightning.ops import dispatch as _dispatch
from psp_lightning.ops import fused_leaky_relu, upfirdn2d
from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.cuda import toolchain as _toolchain
from psp_lightning.utils.errors import UserError

pytestmark = pytest.mark.serial

ARCH = ["8.0"]
# The program of a test process: build with a fake compiler, which records that it ran, and print the result.
WORKER = """
import os, sys
from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.cuda import toolchain as _toolchain
_toolchain.missing = lambda: ""
open(os.environ["ARRIVED"], "a").write("x")
_jit.build_command = lambda scratch: [sys.executable, "-c", {compiler!r}, str(scratch)]
try:
    print("built", _jit.ensure_built(["8.0"]).read_text())
except _jit.BuildError as error:
    print("failed", str(error).replace(chr(10), " "))
"""
NOTE = "import os, sys, time; open(os.environ['RUNS'], 'a').write('x')\n"
# Wait until the other processes of the test have started, and a moment longer.
WAIT = """
end = time.monotonic() + 90
while len(open(os.environ["ARRIVED"]).read()) < 3 and time.monotonic() < end: time.sleep(0.05)
time.sleep(1.5)
"""
GOOD = "open(sys.argv[1] + '/psp_lightning_ops.so', 'w').write('a library')"
BAD = "print('kernel.cu(7): error: no such thing'); sys.exit(3)"
# The compiler dies when the file is half written.
KILLED = "f = open(sys.argv[1] + '/psp_lightning_ops.so', 'w'); f.write('a li'); f.flush(); os.kill(os.getpid(), 9)"


def compiler(what: str) -> str:
    return NOTE + what


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide an empty cache, a fresh process state and no real toolchain."""
    monkeypatch.setenv("PSP_OPS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ARRIVED", str(tmp_path / "arrived"))
    monkeypatch.delenv("PSP_OPS", raising=False)
    monkeypatch.setattr(_jit, "_outcome", None)
    monkeypatch.setattr(_toolchain, "missing", lambda: "")
    return tmp_path / "cache"


def use(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(_jit, "build_command", lambda scratch: [sys.executable, "-c", compiler(what), str(scratch)])


def runs(tmp_path: Path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text()) if path.exists() else 0


def start(what: str) -> subprocess.Popen[str]:
    code = WORKER.format(compiler=compiler(WAIT + what))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_built_once_and_then_found(folder, tmp_path, monkeypatch):
    use(monkeypatch, GOOD)
    library = _jit.ensure_built(ARCH)
    assert library.read_text() == "a library"
    assert _jit.ensure_built(ARCH) == library and runs(tmp_path) == 1
    assert json.loads((library.parent / "build.json").read_text())["torch"] == torch.__version__
    left = {path.name for path in folder.iterdir()} - {f"{library.parent.name}.lock"}
    assert left == {library.parent.name}, "a scratch folder was left"
    assert _jit.ensure_built(["9.0"]) != library and runs(tmp_path) == 2
    monkeypatch.setattr(_toolchain, "missing", lambda: "no compiler")  # a built library needs none
    assert _jit.ensure_built(ARCH) == library


@pytest.mark.slow
@pytest.mark.parametrize("what, word", [(GOOD, "built a library"), (BAD, "failed")], ids=["good", "bad"])
def test_parallel_processes_compile_once(tmp_path, what, word):
    """All processes wait for the one that compiles, and use its library or its failure."""
    workers = [start(what) for _ in range(3)]
    answers = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(answer.startswith(word) for answer in answers), answers
    assert runs(tmp_path) == 1
    if what == BAD:
        assert all("kernel.cu(7): error: no such thing" in answer for answer in answers), answers


def test_a_key_changes_with_everything_that_affects_the_build(monkeypatch, tmp_path):
    keys = {_toolchain.key(ARCH), _toolchain.key(["9.0"])}
    copies = [tmp_path / path.name for path in _toolchain.source_files()]
    for copy, path in zip(copies, _toolchain.source_files(), strict=True):
        copy.write_bytes(path.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(_toolchain, "source_files", lambda: copies)
        assert _toolchain.key(ARCH) in keys, "the key must not depend on the location of the sources"
        copies[0].write_bytes(copies[0].read_bytes() + b"\n")
        keys.add(_toolchain.key(ARCH))
    changes = (
        (torch, "__version__", "0.1"),
        (torch.version, "cuda", "1.0"),
        (_toolchain, "CUDA_CFLAGS", ("-O0",)),
        (sys.implementation, "cache_tag", "x"),
    )
    for target, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(_toolchain.key(ARCH))
    assert len(keys) == 7


def test_the_lock_of_a_killed_process_is_free_at_once(folder, tmp_path, monkeypatch):
    use(monkeypatch, GOOD)
    folder.mkdir()
    path = folder / f"{_toolchain.key(ARCH)}.lock"
    code = f"import filelock, os; filelock.FileLock({str(path)!r}).acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9 and path.exists()
    began = time.monotonic()
    assert _jit.ensure_built(ARCH).is_file()
    assert time.monotonic() - began < 10 and runs(tmp_path) == 1


def test_a_lock_that_is_not_released_is_named(folder, monkeypatch):
    use(monkeypatch, GOOD)
    monkeypatch.setattr(_jit, "LOCK_LIMIT", 0.5)
    folder.mkdir()
    path = folder / f"{_toolchain.key(ARCH)}.lock"
    with filelock.FileLock(path), pytest.raises(_jit.BuildError, match=f"{path.name} for 0.5 s.*PSP_OPS_DIR"):
        _jit.ensure_built(ARCH)
    assert _jit.ensure_built(ARCH).is_file()


def test_a_failing_compiler_warns_once(folder, tmp_path, monkeypatch):
    use(monkeypatch, BAD)
    monkeypatch.setattr(_toolchain, "architectures", lambda: ARCH)
    with pytest.warns(UserWarning) as caught:
        assert _jit.kernels() is None
    (warning,) = caught
    for words in ("Plain PyTorch", "kernel.cu(7): error: no such thing", "status 3", "PSP_OPS=ref", "psp-doctor ops"):
        assert words in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _jit.kernels() is None and _jit.kernels() is None
    assert runs(tmp_path) == 1, "the same process must not try again"
    assert not [path for path in folder.iterdir() if path.is_dir()], "a scratch folder was left"
    monkeypatch.setenv("PSP_OPS", "cuda")
    with pytest.raises(UserError, match="PSP_OPS=cuda.*status 3"):
        _jit.kernels()
    monkeypatch.setattr(_jit, "_outcome", None)  # a new process tries again: the compiler may be fixed
    use(monkeypatch, GOOD)
    assert _jit.ensure_built(ARCH).is_file() and runs(tmp_path) == 2
    assert not list(folder.glob("*.failed"))


def test_a_library_that_cannot_be_loaded_is_a_failure(monkeypatch):
    use(monkeypatch, GOOD)
    monkeypatch.setattr(_toolchain, "architectures", lambda: ARCH)
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert _jit.kernels() is None


def test_a_half_written_library_is_never_used(folder, tmp_path, monkeypatch):
    use(monkeypatch, KILLED)
    with pytest.raises(_jit.BuildError, match="status -9"):
        _jit.ensure_built(ARCH)
    assert not list(folder.rglob("*.so"))
    use(monkeypatch, GOOD)
    library = _jit.ensure_built(ARCH)
    library.write_text("a li")  # damaged later, e.g. by a full disk
    assert _jit.ensure_built(ARCH).read_text() == "a library" and runs(tmp_path) == 3
    (library.parent / "build.json").unlink()
    assert _jit.ensure_built(ARCH).read_text() == "a library" and runs(tmp_path) == 4


def test_a_compiler_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(_jit, "TIME_LIMIT", 2)
    use(monkeypatch, "print('working', flush=True); time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(_jit.BuildError, match="did not finish in 2 s.*\nworking"):
        _jit.ensure_built(ARCH)
    assert time.monotonic() - began < 30


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(_jit.BuildError, match="no GPU"):
        _jit.ensure_built([])
    monkeypatch.setattr(_toolchain, "missing", lambda: "There is no ninja: pip install ninja.")
    with pytest.raises(_jit.BuildError, match="no ninja"):
        _jit.ensure_built(ARCH)
    monkeypatch.setattr(_toolchain, "missing", lambda: "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PSP_OPS_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(_jit.BuildError, match="PSP_OPS_DIR"):
        _jit.ensure_built(ARCH)


def test_choice(monkeypatch):
    assert _dispatch.choice() == "auto"
    monkeypatch.setenv("PSP_OPS", "cude")
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        fused_leaky_relu(torch.ones(1, 2))
    monkeypatch.setenv("PSP_OPS", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        upfirdn2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2))
    monkeypatch.setenv("PSP_OPS", "ref")
    assert upfirdn2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2)).shape == (1, 2, 3, 3)


def test_nothing_happens_on_the_cpu_or_at_import():
    """Neither the builder nor cpp_extension is imported, and no folder is created."""
    code = (
        "import sys, torch\nfrom psp_lightning.ops import fused_leaky_relu\nfused_leaky_relu(torch.ones(2, 3))\n"
        "print([name for name in ('psp_lightning.ops.cuda.build', 'torch.utils.cpp_extension') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert not _jit.ops_dir().exists()


def test_folder(monkeypatch):
    monkeypatch.delenv("PSP_OPS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    if sys.platform == "linux":
        assert _jit.ops_dir() == Path("/some/cache/psp_lightning/ops")
    assert _jit.LOCK_LIMIT > _jit.TIME_LIMIT, "a waiter must outlast a slow compiler"

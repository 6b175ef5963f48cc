"""Builds happen once, atomically and without hanging. The compiler in these tests is a few lines of Python."""

from __future__ import annotations

import json
import shutil
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


def test_native_means_the_gpus(monkeypatch):
    """Also beside others; so each kind of GPU has its own key in a common folder."""
    keys = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capability: c)
        own = f"{capability[0]}.0"
        for listed, expected in (("native", [own]), ("", [own]), (" ; ", [own]), ("8.6;native", ["8.6", own])):
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
            assert _toolchain.architectures() == expected
        keys.append(_toolchain.key(_toolchain.architectures()[-1:]))
    assert len(set(keys)) == 2
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX 9.0+PTX")
    assert _toolchain.architectures() == ["9.0+PTX"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert _toolchain.architectures() == []


@pytest.mark.parametrize("problem", ["no kernel image is available for execution on the device", "the result is wrong"])
def test_a_library_for_other_gpus_is_not_used(problem, monkeypatch):
    """The library loads; its first launch shows that it cannot run here."""

    class Kernels:
        def epilogue(self, out, *_):
            if "image" in problem:
                raise RuntimeError(f"CUDA error: {problem}\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    use(monkeypatch, GOOD)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(_jit, "load", lambda library: Kernels())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    said = f"H100, compute capability 9.0.*{problem}.*built for 8.0 .TORCH_CUDA_ARCH_LIST"
    with pytest.warns(UserWarning, match=said):
        assert _jit.kernels() is None
    monkeypatch.setenv("PSP_OPS", "cuda")
    with pytest.raises(UserError, match=said):
        _jit.kernels()


def test_the_compiler_is_the_one_that_nvcc_uses(tmp_path, monkeypatch):
    for name in ("CC", "CXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _toolchain.compiler() == "c++" and _toolchain.host_compiler_flags() == ["-ccbin", "c++"]
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert _toolchain.compiler() == "g++" and _toolchain.host_compiler_flags() == []
    monkeypatch.setenv("CXX", "g++-12")
    assert _toolchain.compiler() == "g++-12" and _toolchain.host_compiler_flags() == ["-ccbin", "g++-12"]
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-ccbin g++-11")
    assert _toolchain.host_compiler_flags() == []


def test_the_builder_imports_from_where_this_process_does(tmp_path, monkeypatch):
    """The package may be on a path that only sys.path has."""
    copy = tmp_path / "only_here"
    (copy / "psp_lightning" / "ops" / "cuda").mkdir(parents=True)
    for folder in ("", "ops", "ops/cuda"):
        (copy / "psp_lightning" / folder / "__init__.py").touch()
    (copy / "psp_lightning/ops/cuda/compile.py").write_text(
        "import sys\ndef main(): open(sys.argv[1] + '/file', 'w').write(__file__)\n"
    )
    monkeypatch.syspath_prepend(copy)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run(_jit.build_command(tmp_path), check=True, cwd=tmp_path)
    assert (tmp_path / "file").read_text().startswith(str(copy))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs a linker")
def test_a_toolkit_from_pip_is_linked(tmp_path):
    """It has lib/libcudart.so.13 and neither lib64 nor libcudart.so."""
    home, scratch, source = tmp_path / "nvidia" / "cu13", tmp_path / "scratch", tmp_path / "a.c"
    (home / "lib").mkdir(parents=True)
    scratch.mkdir()
    source.write_text("int cudaRuntimeGetVersion(int* v) { return *v = 13; }\n")
    runtime = home / "lib" / "libcudart.so.13"
    shared = ["g++", "-x", "c", "-shared", "-fPIC"]
    subprocess.run([*shared, str(source), "-Wl,-soname,libcudart.so.13", "-o", str(runtime)], check=True)
    flags = _toolchain.link_flags(home, scratch)
    source.write_text("int cudaRuntimeGetVersion(int* v); int f() { int v; return cudaRuntimeGetVersion(&v); }\n")
    out = tmp_path / "out.so"
    link = [*shared, str(source), "-o", str(out), f"-L{home}/lib64", *flags, "-Wl,--no-undefined", "-Wl,--no-as-needed"]
    subprocess.run([*link, "-lcudart"], check=True)
    assert b"libcudart.so.13" in out.read_bytes(), "the library is found under its own name when it is loaded"
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert _toolchain.link_flags(home, scratch) == [], "an installed toolkit needs none"
    assert _toolchain.link_flags(tmp_path, scratch) == []


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


NINJA = """[1/2] /usr/local/cuda/bin/nvcc -MD -DTORCH_EXTENSION_NAME=x -c /csrc/epilogue.cu -o epilogue.cuda.o
FAILED: [code=2] epilogue.cuda.o
/usr/local/cuda/bin/nvcc -MD -DTORCH_EXTENSION_NAME=x -c /csrc/epilogue.cu -o epilogue.cuda.o
{}
ninja: build stopped: subcommand failed.
Traceback (most recent call last):
  File "/torch/utils/cpp_extension.py", line 2980, in _run_ninja_build
    subprocess.run(
subprocess.CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 2.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/psp_lightning/ops/cuda/compile.py", line 30, in <module>
    main()
RuntimeError: Error building extension 'psp_lightning_ops'
"""
PLAIN = """W1126 02:05:34.247000 2713 cpp_extension.py:183] No CUDA runtime is found
Traceback (most recent call last):
  File "/torch/utils/cpp_extension.py", line 2814, in _get_cuda_arch_flags
    raise ValueError(f"Unknown CUDA arch ({arch}) or GPU not supported")
ValueError: Unknown CUDA arch (1.0) or GPU not supported
"""


@pytest.mark.parametrize(
    "log, first, all_of_it",
    [
        (NINJA.format('a.cu(35): error: "x" is undefined\n    y = x;\n        ^\n'), "a.cu(35): error:", "    y = x;"),
        (NINJA.format("nvcc fatal   : Unsupported gpu architecture 'compute_999'"), "nvcc fatal", "compute_999"),
        (NINJA.format("/usr/bin/ld: cannot find -lcudart: No such file"), "/usr/bin/ld", "-lcudart"),
        (NINJA.format("a.h(3): warning #177-D: unused\n" * 20 + "sh: 1: c++: not found"), "sh: 1:", "not found"),
        (PLAIN, "W1126", "ValueError: Unknown CUDA arch (1.0) or GPU not supported"),
        ("line\n" * 30 + "the last one\n", "line", "the last one"),
    ],
    ids=["nvcc", "architecture", "linker", "no compiler", "before the compiler", "no error"],
)
def test_a_build_error_shows_the_compilers_own_lines(log, first, all_of_it, monkeypatch):
    use(monkeypatch, f"print({log!r}); sys.exit(1)")
    with pytest.raises(_jit.BuildError) as caught:
        _jit.ensure_built(ARCH)
    head, *lines = str(caught.value).splitlines()
    assert head == "The compiler failed (status 1). It says:" and lines[0].startswith(first), lines
    assert all_of_it in str(caught.value) and len(lines) <= _jit.SHOWN
    for noise in ("Traceback", 'cpp_extension.py"', "Error building extension", "-DTORCH"):
        assert noise not in str(caught.value)


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

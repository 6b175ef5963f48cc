"""The inputs of a kernel build: sources, flags, CUDA toolkit, architectures, and the key of the build."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

NAME = "psp_lightning_ops"
CFLAGS = ("-O3",)
CUDA_CFLAGS = ("-O3",)
ADVICE = "Install the CUDA toolkit and a C++ compiler, or set PSP_OPS=ref to use PyTorch without this warning."


def source_files() -> list[Path]:
    """Return all files of csrc/, including headers."""
    return sorted(path for path in (Path(__file__).parent / "csrc").iterdir() if path.is_file())


def architectures() -> list[str]:
    """Return the compute capabilities to build for, such as `["8.0", "9.0"]`.

    They come from `$TORCH_CUDA_ARCH_LIST` if it is set, otherwise from the visible GPUs. The item `native` of the list
    stands for the visible GPUs, too.
    """
    result: list[str] = []
    for item in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ") or "native"):
        result += [of_gpu for of_gpu in (_of_gpus() if item == "native" else [item]) if of_gpu not in result]
    return result


def _of_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def key(architectures: list[str]) -> str:
    """Return the name of a build, which changes with everything that changes the library or makes it unusable here.

    The CUDA toolkit is not included, so a machine without one can use a library that another machine built.
    """
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    abi = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{platform.libc_ver()}"
    facts = (CFLAGS, CUDA_CFLAGS, torch.__version__, torch.version.cuda, tuple(architectures), abi)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def link_flags(home: Path, scratch: Path) -> list[str]:
    """Return the linker flags for the CUDA runtime of a toolkit from pip.

    The libraries of such a toolkit are in `lib`, where PyTorch's builder does not look. They lack the name
    `libcudart.so`, which is made in `scratch`.
    """
    if (home / "lib64" / "libcudart.so").exists():
        return []
    found = sorted((home / "lib").glob("libcudart.so*"))
    if not found:
        return []
    link = scratch / "libcudart.so"
    link.symlink_to(found[0])
    return [f"-L{scratch}"]


@functools.lru_cache(maxsize=1)
def cuda_home() -> Path | None:
    """Return the CUDA toolkit: `$CUDA_HOME`, `$CUDA_PATH`, the nvcc on the PATH, the usual folders, or pip's packages.

    The first toolkit with the major version of PyTorch's CUDA is preferred, because PyTorch rejects others. A folder
    counts only if it has the compiler and the headers: an nvcc on the PATH may be a script in another place.
    """
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if found := shutil.which("nvcc"):
        candidates.append(Path(found).resolve().parents[1])
    candidates += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    candidates += sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*"), reverse=True)
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    complete = [path for path in candidates if all((path / name).is_file() for name in needed)]
    major = (torch.version.cuda or "").split(".")[0]
    fitting = [path for path in complete if nvcc_version(path).split(".")[0] == major]
    return next(iter(fitting or complete), None)


def nvcc_version(home: Path) -> str:
    """Return the version of nvcc, such as "13.0"; empty if it does not run."""
    return _search_output(r"release (\S+),", [str(home / "bin/nvcc"), "--version"])


def ninja_version() -> str:
    """Return the version of ninja, such as "1.13.0"; empty without ninja."""
    return _search_output(r"^(\S+)", ["ninja", "--version"])


def compiler() -> str:
    """Return the C++ compiler, which nvcc uses as well: `$CXX`, or g++, which is nvcc's default, or c++."""
    return os.environ.get("CXX") or ("g++" if shutil.which("g++") else "c++")


def host_compiler_flags() -> list[str]:
    """Return the flags that make nvcc use `compiler`, unless the environment names another host compiler.

    PyTorch's builder passes `$CC` itself.
    """
    flags = os.environ.get("NVCC_PREPEND_FLAGS", "") + os.environ.get("NVCC_APPEND_FLAGS", "")
    named = "-ccbin" in flags or "--compiler-bindir" in flags or os.environ.get("CC") or os.environ.get("NVCC_CCBIN")
    return [] if named or compiler() == "g++" else ["-ccbin", compiler()]


def compiler_version() -> str:
    """Return the first line that the C++ compiler prints for --version; empty without a compiler."""
    return _search_output(r"^(.+)$", [compiler(), "--version"])


def _search_output(pattern: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(pattern, done.stdout, re.MULTILINE)
    return match[1] if match and done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """Return the environment with the scripts of this Python on the PATH: ninja may exist only there."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}


def missing() -> str:
    """Return the reason why a build is impossible, in one sentence; empty if it is possible."""
    if sys.platform == "win32":
        return "The kernels can only be built on Linux."
    if torch.version.cuda is None:
        return "This PyTorch was built without CUDA."
    home = cuda_home()
    if home is None:
        return "There is no CUDA toolkit (nvcc with its headers). If it is in an unusual place, set CUDA_HOME."
    if nvcc_version(home).split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{home} is CUDA {nvcc_version(home) or '?'}, but PyTorch was built with CUDA {torch.version.cuda}."
    if not ninja_version():
        return "There is no ninja: pip install ninja."
    if not compiler_version():
        return "There is no C++ compiler: install c++, or set CXX to another one."
    return ""

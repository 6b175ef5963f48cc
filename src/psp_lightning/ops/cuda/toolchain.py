"""What the kernels are built with: sources, flags, CUDA toolkit, architectures, and the key of a build."""

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
ADVICE = "Install the CUDA toolkit and a C++ compiler, or set PSP_OPS=ref to stay with PyTorch without this warning."


def source_files() -> list[Path]:
    """All files of csrc/, headers too."""
    return sorted(path for path in (Path(__file__).parent / "csrc").iterdir() if path.is_file())


def compiled_files() -> list[Path]:
    """Those that are handed to a compiler."""
    return [path for path in source_files() if path.suffix in (".cpp", ".cu")]


def architectures() -> list[str]:
    """Compute capabilities to build for: `$TORCH_CUDA_ARCH_LIST`, else those of the visible GPUs; `["8.0", "9.0"]`."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return [item for item in re.split(r"[;\s]+", chosen) if item]
    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def key(architectures: list[str]) -> str:
    """Name of a build: changes with all that could make it another library or unfit for this process.

    The toolkit that compiles it is no part of it, so that a machine without one can use what another one built.
    """
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    abi = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{platform.libc_ver()}"
    facts = (CFLAGS, CUDA_CFLAGS, torch.__version__, torch.version.cuda, tuple(architectures), abi)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def cuda_home() -> Path | None:
    """The CUDA toolkit: `$CUDA_HOME`, `$CUDA_PATH`, that of the nvcc on the PATH, the usual folders, pip's packages.

    Among several the first with the major version that PyTorch was built with, since PyTorch refuses another. A folder
    counts when it has the compiler and the headers: an nvcc on the PATH may be a script that stands elsewhere.
    """
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if found := shutil.which("nvcc"):
        candidates.append(Path(found).resolve().parents[1])
    candidates += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    candidates += sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*"), reverse=True)
    complete = [path for path in candidates if _nvcc(path).is_file() and (path / "include/cuda_runtime.h").is_file()]
    major = (torch.version.cuda or "").split(".")[0]
    fitting = [path for path in complete if nvcc_version(path).split(".")[0] == major]
    return next(iter(fitting or complete), None)


def _nvcc(home: Path) -> Path:
    return home / "bin" / "nvcc"


def nvcc_version(home: Path) -> str:
    """Such as "13.0"; empty where the compiler does not run."""
    return _first(r"release (\S+),", [str(_nvcc(home)), "--version"])


def ninja_version() -> str:
    """Such as "1.13.0"; empty without ninja."""
    return _first(r"^(\S+)", ["ninja", "--version"])


def compiler_version() -> str:
    """First line of the C++ compiler about itself; empty without one."""
    return _first(r"^(.+)$", [os.environ.get("CXX") or "c++", "--version"])


def _first(pattern: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(pattern, done.stdout, re.MULTILINE)
    return match[1] if match and done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """This process's variables, with the scripts of its Python on the PATH: ninja may be there alone."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}


def missing() -> str:
    """What stands in the way of a build, in one sentence; empty if nothing."""
    if sys.platform == "win32":
        return "They are built on Linux alone."
    if torch.version.cuda is None:
        return "This PyTorch was built without CUDA."
    home = cuda_home()
    if home is None:
        return "There is no CUDA toolkit (nvcc with its headers): set CUDA_HOME where it is in an unusual place."
    if nvcc_version(home).split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{home} is CUDA {nvcc_version(home) or '?'}, PyTorch was built with CUDA {torch.version.cuda}."
    if not ninja_version():
        return "There is no ninja: pip install ninja."
    if not compiler_version():
        return "There is no C++ compiler (c++; another one: CXX)."
    return ""

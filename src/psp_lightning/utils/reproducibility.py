"""Matrix products that repeat bit for bit, and what their last bits depend on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

VARIABLE, VALUE = "MKL_CBWR", "AUTO,STRICT"
# of MKL's mkl_types.h
AUTO, STRICT, ALL = 2, 0x10000, -1
BRANCHES = {1: "off", AUTO: "AUTO", 3: "COMPATIBLE", 10: "AVX2", 12: "AVX512"}
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def make_reproducible() -> bool:
    """Make matrix products on the CPU repeat bit for bit, in this process and in those that it starts.

    PyTorch multiplies matrices with Intel's MKL on x86 processors. By default MKL may add in another order from call to
    call: two runs of one training with the same seed then drift apart. `MKL_CBWR=AUTO,STRICT` fixes the order for every
    number of threads, at the same speed. MKL reads this variable once, at its first product, so call this function
    before. A value of `MKL_CBWR` that is set already stays. The commands of this package call it first; PyTorch is not
    imported by it.

    Returns:
        Whether this process's products repeat: False when MKL has computed without the setting before, or when
        `MKL_CBWR` was set to a value without `STRICT`. True where PyTorch comes without MKL, which needs no setting.
    """
    inherited = os.environ.get(VARIABLE)
    value = os.environ.setdefault(VARIABLE, VALUE)  # also for ranks and data loader workers
    if "torch" not in sys.modules:
        return "STRICT" in value
    import torch

    if not torch.backends.mkl.is_available():
        return True
    library = _mkl()
    if library is None:  # PyTorch was loaded before, and nobody can say what it has computed since
        return inherited is not None and "STRICT" in inherited
    if value == VALUE and not library.mkl_serv_cbwr_get(ALL) & STRICT:
        library.mkl_serv_cbwr_set(AUTO | STRICT)  # refused after the first product
    return bool(library.mkl_serv_cbwr_get(ALL) & STRICT)


def arithmetic() -> dict[str, str | int]:
    """Return what decides the last bits of a computation in this process, as plain values by name.

    Two runs with equal values on one machine agree bit for bit. Imports PyTorch.
    """
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "processor": processor(),
        "instructions": " ".join(name for name in INSTRUCTIONS if name in _cpuinfo("flags").split()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": _mkl_mode(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        "onednn_fpmath_mode": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "default"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in gpus) or "none",
    }


def processor() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of a key of Linux's /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _mkl_mode() -> str:
    """MKL's reproducibility mode in this process, in the words of `MKL_CBWR`."""
    import torch

    if not torch.backends.mkl.is_available():
        return "no MKL"
    library = _mkl()
    if library is None:
        return f"unknown, {VARIABLE}={os.environ.get(VARIABLE, '')}"
    mode = library.mkl_serv_cbwr_get(ALL)
    branch = mode & ~STRICT
    return BRANCHES.get(branch, f"branch {branch}") + (",STRICT" if mode & STRICT else "")


def _mkl() -> Any:
    """MKL as PyTorch has loaded it, or None where its settings cannot be reached."""
    import torch

    name = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "")
    try:
        library = ctypes.CDLL(os.fspath(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None
    return library if hasattr(library, "mkl_serv_cbwr_get") and hasattr(library, "mkl_serv_cbwr_set") else None

"""Matrix products that repeat bit for bit, and a record of what their last bits depend on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

VARIABLE, VALUE = "MKL_CBWR", "AUTO,STRICT"
# from MKL's mkl_types.h
AUTO, STRICT, ALL = 2, 0x10000, -1
BRANCHES = {1: "off", AUTO: "AUTO", 3: "COMPATIBLE", 10: "AVX2", 12: "AVX512"}
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def make_reproducible() -> bool:
    """Make matrix products on the CPU repeat bit for bit, in this process and its child processes.

    On x86 processors, PyTorch multiplies matrices with Intel's MKL. By default, MKL may change the order of its sums
    between calls, so two trainings with the same seed drift apart. `MKL_CBWR=AUTO,STRICT` fixes the order for every
    number of threads, at the same speed. MKL reads this variable once, at its first product, so call this function
    earlier than that. An existing value of `MKL_CBWR` is kept. The commands of this package call this function first.
    It does not import PyTorch.

    Returns:
        Whether matrix products in this process repeat. False if MKL has already computed without the setting, or if
        `MKL_CBWR` was set to a value without `STRICT`. True if PyTorch was built without MKL, which needs no setting.
    """
    inherited = os.environ.get(VARIABLE)
    value = os.environ.setdefault(VARIABLE, VALUE)  # ranks and data loader workers inherit it
    if "torch" not in sys.modules:
        return "STRICT" in value
    import torch

    if not torch.backends.mkl.is_available():
        return True
    library = _mkl()
    if library is None:  # PyTorch is loaded already, and whether it has computed anything is unknown
        return inherited is not None and "STRICT" in inherited
    if value == VALUE and not library.mkl_serv_cbwr_get(ALL) & STRICT:
        library.mkl_serv_cbwr_set(AUTO | STRICT)  # refused after the first product
    return bool(library.mkl_serv_cbwr_get(ALL) & STRICT)


def arithmetic() -> dict[str, str | int]:
    """Return everything that affects the last bits of a computation in this process, as plain values by name.

    Two runs on one machine agree bit for bit if these values are equal. This function imports PyTorch.
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
    """Return the first value of a key in Linux's /proc/cpuinfo, or an empty string."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _mkl_mode() -> str:
    """Return MKL's reproducibility mode in this process, as `MKL_CBWR` spells it."""
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
    """Return the MKL library that PyTorch has loaded, or None if its settings are not accessible."""
    import torch

    name = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "")
    try:
        library = ctypes.CDLL(os.fspath(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None
    return library if hasattr(library, "mkl_serv_cbwr_get") and hasattr(library, "mkl_serv_cbwr_set") else None

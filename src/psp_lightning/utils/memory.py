"""Reuse of the memory of freed CPU tensors, and the peak of the memory in use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def computes_on_cpu(accelerator: str) -> bool:
    """Return whether the accelerator setting selects the CPU on this machine."""
    import torch

    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors in this process for reuse; return whether that is supported and enabled.

    By default glibc returns each block above 32 MB to the system, which clears the pages again for the next tensor. At
    1024 px that takes longer than most operations. Memory that is kept is reused without clearing, but the process
    stays as large as its peak. Results do not change. The setting affects the whole process, so commands use it and
    libraries should not. `PSP_KEEP_MEMORY=0` turns it off. It only has an effect on Linux with glibc.
    """
    if os.environ.get("PSP_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # -1 means never. The largest threshold, 2 GiB, is less than what a training step at 1024 px frees.
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))


def limit_primitive_cache(*_: Any) -> None:
    """Let oneDNN keep only a few compiled operations in this process, which must not have used oneDNN yet.

    By default it keeps 1024, for each shape of an input its own. When every photo has another size, these grow to half
    a gigabyte and are rarely used again.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def reset_peak_memory(device: Any) -> None:
    """Start a new measurement of `peak_memory`. Only Linux and CUDA can; elsewhere, the peak is since the start."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Any) -> float | None:
    """Return the peak in MiB of the tensors on a GPU, otherwise of the whole process; None if it is not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024
    with contextlib.suppress(ImportError):
        import resource

        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return None

"""Memory that tensors on the CPU leave behind."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def computes_on_cpu(accelerator: str) -> bool:
    """Whether the setting means the CPU here."""
    import torch

    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; whether it could be arranged.

    glibc returns each block above 32 MB to the system, which clears its pages again for the next tensor: at 1024 px
    that takes longer than most operations. Kept, it is reused as it is; the process stays as large as it has ever been.
    Numbers do not change. Settings of the whole process, for commands and not for a library that others import.
    `PSP_KEEP_MEMORY=0` turns it off. Nothing happens elsewhere than on Linux with glibc.
    """
    if os.environ.get("PSP_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # -1: never. The largest number, 2 GiB, is less than a training step at 1024 px leaves behind.
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))

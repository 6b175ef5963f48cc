"""The machine and the versions that figures belong to, without names of hosts or users."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16. Otherwise it is emulated and slower than float32."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.machine() == "arm64"
    return any(flag in file.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def commit(folder: Path) -> str | None:
    """Return the git commit of a clone, with "-dirty" if files differ from it.

    Return None for a folder that is not the root of a clone, even inside another clone.
    """
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def describe(device: str) -> dict[str, Any]:
    """Describe the machine and the versions in plain values."""
    import torch

    import psp_lightning
    from psp_lightning.utils.reproducibility import processor

    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "psp_lightning": psp_lightning.__version__,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found

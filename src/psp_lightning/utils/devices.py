"""Device settings, resolved on this machine, and the ranks that they start."""

from __future__ import annotations

import os
from typing import Any

from psp_lightning.utils.errors import UserError, suggest

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def resolve_devices(accelerator: str, devices: Any) -> tuple[str, int | list[int]]:
    """Return accelerator and devices for a Trainer; the devices are a number, or a list of CUDA device ids.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        devices: a number, `auto` or -1 (all), or ids as a list or comma-separated text.

    Raises:
        UserError: the accelerator is unknown or missing, or `devices` is invalid or asks for too many devices.
    """
    import torch

    if accelerator not in ACCELERATORS:
        raise UserError(
            f"accelerator={accelerator} is unknown.{suggest(accelerator, ACCELERATORS)} "
            f"Choose from: {', '.join(ACCELERATORS)}"
        )
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"accelerator={accelerator}: PyTorch finds no CUDA device. Use cpu (trainer=cpu) or auto.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator=mps: PyTorch finds no Apple GPU. Use cpu (trainer=cpu) or auto.")
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    available = torch.cuda.device_count() if cuda else 1
    if devices in ("auto", -1, "-1"):
        return accelerator, available
    try:
        if isinstance(devices, str):
            devices = [int(part) for part in devices.split(",")] if "," in devices else int(devices)
        chosen = devices if isinstance(devices, int) else [int(device) for device in devices]
        count = chosen if isinstance(chosen, int) else len(chosen)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"devices={devices!r}: give a number of at least 1, a list of device ids, or auto.")
    if cuda and (count > available or (isinstance(chosen, list) and max(chosen) >= available)):
        raise UserError(f"devices={devices!r}: this machine has {available} CUDA device(s).")
    return accelerator, chosen if cuda else count


def count_devices(accelerator: str, devices: Any) -> int:
    """Return the number of processes that the settings ask for; raise the errors of `resolve_devices`."""
    chosen = resolve_devices(accelerator, devices)[1]
    return chosen if isinstance(chosen, int) else len(chosen)


def is_first_rank() -> bool:
    """Return whether this process is the first rank, as torchrun, srun and Lightning number them."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


def check_launched(local: int) -> None:
    """Raise a UserError if torchrun started more or fewer processes than `local`, the devices in the settings.

    Otherwise each process would act as the whole run.
    """
    started = int(os.environ.get("LOCAL_WORLD_SIZE", local))
    if started != local:
        raise UserError(
            f"torchrun started {started} processes on this machine, but trainer.devices asks for {local}. "
            "Use the same number for both."
        )

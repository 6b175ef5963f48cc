"""How many processes a device setting means."""

from __future__ import annotations

from typing import Any

from psp_lightning.utils.errors import UserError


def count_devices(accelerator: str, devices: Any) -> int:
    """How many processes `trainer.accelerator` and `trainer.devices` ask for.

    Raises:
        UserError: when `devices` is not a number, a list of ids, `auto` or -1, or asks for none.
    """
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        available = torch.cuda.device_count()
    else:
        available = 1
    if devices in ("auto", -1, "-1"):
        return available
    try:
        if isinstance(devices, str):
            devices = [int(part) for part in devices.split(",")] if "," in devices else int(devices)
        count = devices if isinstance(devices, int) else len(devices)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"devices={devices!r}: give a number of at least 1, a list of device ids, or auto.")
    return count

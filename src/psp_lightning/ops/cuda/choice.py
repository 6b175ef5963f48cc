"""The user's choice between the CUDA kernels and plain PyTorch."""

from __future__ import annotations

import os

from psp_lightning.utils.errors import UserError, suggest

CHOICES = ("auto", "cuda", "ref")


def choice() -> str:
    """Return `$PSP_OPS`: `auto` (kernels if they can be built), `cuda` (kernels or an error), `ref` (plain PyTorch).

    Raises:
        UserError: the variable has another value.
    """
    value = os.environ.get("PSP_OPS") or "auto"
    if value not in CHOICES:
        raise UserError(f"PSP_OPS={value} is unknown.{suggest(value, CHOICES)} Choose from: {', '.join(CHOICES)}.")
    return value

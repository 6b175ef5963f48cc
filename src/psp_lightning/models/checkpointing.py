"""Activation checkpointing of residual units: training takes less memory and more time.

Source: Chen et al. (arXiv:1604.06174).
"""

from __future__ import annotations

import functools
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psp_lightning.models.irse import ResidualUnit
from psp_lightning.ops.dispatch import is_captured
from psp_lightning.utils.errors import UserError


def checkpoint_units(encoder: nn.Module) -> None:
    """Make the residual units of an encoder keep only their inputs for the backward pass, in place.

    Raises:
        UserError: the encoder has no residual units.
    """
    units = [module for module in encoder.modules() if isinstance(module, ResidualUnit)]
    if not units:
        name = type(encoder).__name__
        raise UserError(f"model.checkpointing=true, but {name} has no residual units. Set model.checkpointing=false.")
    for unit in units:
        unit.__class__ = CheckpointedUnit


class CheckpointedUnit(ResidualUnit):
    """A residual unit that recomputes its activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or is_captured():
            return super().forward(x)
        again: Tensor = checkpoint(
            super().forward, x, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _WithoutStatistics(self)),
        )  # fmt: skip
        return again


class _WithoutStatistics:
    """A reusable context in which the BatchNorm layers of a module do not count a batch a second time.

    It changes settings of the layers, so only one thread may enter it at a time.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.before: list[tuple[Any, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        _statistics_lock().acquire()
        norms = [m for m in self.unit.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        for norm in norms:
            count = norm.num_batches_tracked
            self.before.append((norm, norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0  # track_running_stats=False would save other tensors than in the first pass

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.before:
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)
        self.before.clear()
        _statistics_lock().release()


@functools.cache
def _statistics_lock() -> Any:
    """Return the lock of `_WithoutStatistics`, created at its first use because imports do no work."""
    return threading.RLock()

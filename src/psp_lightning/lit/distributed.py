"""Several ranks: means and values of all of them, and a strategy without DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor


def _world() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def gather(value: Any) -> list[Any]:
    """Return the `value` of every rank, in rank order; without a process group, of this one."""
    if (world := _world()) == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of `value` over all ranks, of its shape."""
    if (world := _world()) > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world
    return value


@torch.no_grad()
def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, in one reduction; every rank gives the same shapes."""
    tensors = list(tensors)
    if _world() == 1 or not tensors:
        return
    flat = mean_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class UnwrappedDDP(DDPStrategy):
    """`DDPStrategy` for modules that average their gradients themselves: it launches and starts the process group.

    The module is not wrapped; its weights start as those of rank 0.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            torch.distributed.broadcast(tensor.detach(), 0)

"""Communication between ranks, who numbers them, and a strategy without DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from psp_lightning.utils.devices import started_rank


def _world() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def cluster() -> ClusterEnvironment:
    """Return the plugin that tells Lightning's Trainer how the ranks are numbered, in agreement with `started_rank`.

    Lightning would not put a job of Slurm back into the queue: the run ends with a checkpoint instead, and
    `resume=auto` continues it.
    """
    rank = started_rank()
    if rank is None:
        return LightningEnvironment()
    return SLURMEnvironment(auto_requeue=False) if rank.launcher == "srun" else TorchElasticEnvironment()


def gather(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order; without a process group, only the value of this process."""
    if (world := _world()) == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of `value` over all ranks, in the same shape."""
    if (world := _world()) > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= world
    return value


@torch.no_grad()
def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor with its mean over all ranks, in one reduction; shapes must agree on all ranks."""
    tensors = list(tensors)
    if _world() == 1 or not tensors:
        return
    flat = mean_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all ranks, (n * ranks, ...), in the order that one rank with the whole batch has.

    n must agree on all ranks.
    """
    if (world := _world()) == 1:
        return rows
    shares = [torch.empty_like(rows) for _ in range(world)]
    torch.distributed.all_gather(shares, rows.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor with its value on rank 0."""
    if _world() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)


class MachineBatchNorm(TorchSyncBatchNorm):
    """A plugin of the Trainer that synchronizes BatchNorm among the devices of each machine, not between machines.

    Args:
        devices: number of devices of each machine. The ranks of a machine must follow each other, as torchrun and srun
            number them by default.
    """

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with SyncBatchNorm layers; all ranks must call this."""
        group, _ = torch.distributed.new_subgroups(self.devices)
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        return converted


class UnwrappedDDP(DDPStrategy):
    """A `DDPStrategy` for modules that average their own gradients.

    It starts the processes and their group but does not wrap the module. All ranks start with rank 0's weights.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        broadcast([*self.model.parameters(), *self.model.buffers()])

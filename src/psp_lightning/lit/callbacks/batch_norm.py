"""BatchNorm running statistics that are equal on all ranks."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from psp_lightning.lit.distributed import average_over_ranks


class AverageBatchNorm(Callback):
    """Averages the encoder's running statistics over all ranks after each step.

    Unless SyncBatchNorm spans all ranks, each rank updates its running statistics from its own batches only (with
    `MachineBatchNorm`, from the batches of its machine), and validations and checkpoints would use the statistics of a
    single rank.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        layers = [m for m in pl_module.net.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [layer for layer in layers if layer.training and not _is_equal_on_all_ranks(layer)]
        average_over_ranks(b for m in layers for b in (m.running_mean, m.running_var) if b is not None)


def _is_equal_on_all_ranks(layer: nn.Module) -> bool:
    return isinstance(layer, nn.SyncBatchNorm) and layer.process_group is None

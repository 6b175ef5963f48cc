"""Running statistics of BatchNorm that all ranks share."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from psp_lightning.lit.distributed import average_over_ranks


class AverageBatchNorm(Callback):
    """Averages the encoder's running statistics over the ranks after each step.

    Without SyncBatchNorm every rank normalises by its own batch and keeps its own running statistics: a validation or a
    checkpoint would then show only one rank's.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        layers = [m for m in pl_module.net.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [layer for layer in layers if layer.training and not isinstance(layer, nn.SyncBatchNorm)]
        average_over_ranks(b for m in layers for b in (m.running_mean, m.running_var) if b is not None)

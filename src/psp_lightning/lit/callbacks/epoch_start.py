"""An exact resume from a checkpoint that was written after the last batch of an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class EpochStart(pl.Callback):
    """After a resume between two epochs, begin the next epoch as if there had been no interruption.

    Lightning (seen in 2.6.6) resumes from a checkpoint of `on_train_epoch_end`, or of the end of `fit` when it falls on
    an epoch's end, with the batch counter of the finished epoch: it then ends the next epoch after one batch.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        total: Any = loop.epoch_progress.total
        current: Any = loop.epoch_progress.current
        between = total.ready == total.started == total.processed
        if loop.restarting and between and loop.epoch_loop.batch_progress.current.ready:
            total.completed, current.completed = total.processed, current.processed
            loop._restarting = False  # its setter keeps True for runs that count steps
            loop.epoch_loop.restarting = False
            loop.reset_restart_stage()

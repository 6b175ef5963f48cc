"""Exact resume from a checkpoint written after the last batch of an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class EpochStart(pl.Callback):
    """After a resume between two epochs, starts the next epoch as if the run had not been interrupted.

    A checkpoint written in `on_train_epoch_end`, or at the end of a `fit` that ends with an epoch, contains the batch
    counter of the finished epoch. Lightning (seen in 2.6.6) resumes with that counter and ends the next epoch after one
    batch.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        total: Any = loop.epoch_progress.total
        current: Any = loop.epoch_progress.current
        between = total.ready == total.started == total.processed
        if loop.restarting and between and loop.epoch_loop.batch_progress.current.ready:
            total.completed, current.completed = total.processed, current.processed
            loop._restarting = False  # the setter keeps True if max_steps is set
            loop.epoch_loop.restarting = False
            loop.reset_restart_stage()

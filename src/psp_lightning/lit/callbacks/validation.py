"""Validation every n optimizer steps."""

from __future__ import annotations

import pytorch_lightning as pl


class ValidateEvery(pl.Callback):
    """Validates every `steps` optimizer steps, whatever the gradient accumulation and the length of an epoch.

    Lightning schedules validations by batches. With accumulation, batches do not correspond to steps, because the last
    batch of an epoch completes a step early. The Trainer needs an integer `val_check_interval`, whose value is not
    used, and `check_val_every_n_epoch=None`.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # a checkpoint that was written after a validation (also of a run that stopped) resumes after it
        self._schedule(trainer, trainer.global_step % self.steps == 0 or trainer.fit_loop.epoch_loop.restarted_on_last)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self._schedule(trainer, trainer.global_step != self._step and trainer.global_step % self.steps == 0)

    def _schedule(self, trainer: pl.Trainer, due: bool) -> None:
        """Set `val_check_batch`: Lightning validates if it divides the number of batches."""
        self._step = trainer.global_step
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which validates its only batch
            batches = trainer.fit_loop.total_batch_idx + 1
            trainer.val_check_batch = max(1, batches) if due else batches + 1

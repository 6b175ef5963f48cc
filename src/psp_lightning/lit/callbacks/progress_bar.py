"""The progress bar for training."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """One progress bar for the whole run: steps, time left, the loss and its terms."""

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.reset(trainer.max_steps if trainer.max_steps > 0 else None)
        bar.initial = bar.n = trainer.global_step  # a resumed run estimates the time left from its own steps
        bar.set_description("train")

    def on_train_epoch_start(self, *args: Any) -> None:
        """Do not reset the bar, which counts the steps of the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if step > bar.n:
            bar.update(step - bar.n)
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/").removeprefix("loss_"): value for name, value in metrics.items()}

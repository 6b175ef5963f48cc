"""End a run of a search early if other runs are better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class Pruning(pl.Callback):
    """Reports the objective to its trial after each validation, and stops the run if the trial asks for it.

    The first rank reports and decides for all ranks, which then stop at the same step. The run ends as one that has
    reached its last step: `last.ckpt` is written.

    Args:
        open_trial: returns an Optuna trial: `report(value, step)`, `should_prune()`. Only the first rank calls it.
        objective: name of the logged value.

    Attributes:
        pruned: whether the run was stopped.
    """

    def __init__(self, open_trial: Callable[[], Any], objective: str) -> None:
        self.open_trial, self.objective = open_trial, objective
        self.trial: Any = None
        self.pruned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.objective)
        prune = False
        if trainer.is_global_zero and value is not None and math.isfinite(value):  # otherwise the loss ends the run
            self.trial = self.trial or self.open_trial()
            self.trial.report(float(value), trainer.global_step)
            prune = trainer.global_step < trainer.max_steps and self.trial.should_prune()
        if trainer.strategy.broadcast(prune):
            self.pruned = trainer.should_stop = True

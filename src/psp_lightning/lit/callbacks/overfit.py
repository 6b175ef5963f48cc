"""The check of a training that must succeed: the loss of a few images falls."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch

from psp_lightning.lit.distributed import gather
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.errors import UserError

log = logging.getLogger(__name__)


class LossFalls(pl.Callback):
    """Ends the run with an error if its training loss did not fall.

    Compares the mean loss of the first `window` steps with the mean loss of the last `window` steps, over all ranks. A
    run that is stopped early or resumed is not judged.

    Args:
        factor: factor by which the loss must fall; 2: to half of its first value or less.
        window: number of steps whose losses are averaged.

    Raises:
        UserError: at the end of the fit, after the last checkpoint was written.
    """

    def __init__(self, factor: float = 2.0, window: int = 10) -> None:
        self.factor, self.window = number("factor", factor, 1), whole("window", window, 1)
        self._losses: list[torch.Tensor] = []
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._losses, self._first = [], trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self._losses.append(outputs["loss"].detach())

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._first or trainer.global_step < trainer.max_steps:
            return
        losses = torch.stack(self._losses).tolist()
        n = min(self.window, max(1, len(losses) // 2))
        ends = gather((sum(losses[:n]) / n, sum(losses[-n:]) / n))
        first, last = (sum(values) / len(ends) for values in zip(*ends, strict=True))
        fell = first / last if last > 0 else float("inf")
        text = f"the loss went from {first:.4g} to {last:.4g} in {trainer.max_steps} steps, a factor of {fell:.2f}"
        if fell < self.factor:
            raise UserError(
                f"{text}; on a few images it must fall by {self.factor:g} or more. The network cannot learn these "
                "images: check data, generator and losses with psp-doctor data and the same settings, try a larger "
                "optimizer.lr or trainer.max_steps, or lower callbacks.overfit.factor."
            )
        if trainer.is_global_zero:
            log.info("%s: it can learn these images", text)

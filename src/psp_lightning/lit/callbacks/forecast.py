"""How long a training will take."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

import pytorch_lightning as pl

log = logging.getLogger(__name__)
LONG = 4 * 3600  # seconds; the shipped networks took less on a CPU


class Forecast(pl.Callback):
    """Logs once how long the rest of the run will take, after its first steps.

    Measures 16 steps, which contain each penalty of a generator's training as often as its period says, or at least one
    minute. The first step is left out, because it is slower.

    Args:
        advice: what shortens the training; logged with a warning if the run will take hours on a CPU.
    """

    steps, seconds = 16, 60

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._first, self._done = 0, False
        self._start: float | None = None  # end of the first step

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._first = trainer.global_step + 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        steps, now = trainer.global_step - self._first, monotonic()
        if self._start is None:
            self._start = now if steps == 0 else None
        elif steps and not self._done and (steps >= self.steps or now - self._start >= self.seconds):
            self._done = True
            left, pace = trainer.max_steps - trainer.global_step, (now - self._start) / steps
            if trainer.is_global_zero and left > 0:
                step, total, rest = trainer.global_step, trainer.max_steps, duration(left * pace)
                log.info("step %d of %d: about %s to go, at %.3g s per step", step, total, rest, pace)
                if left * pace > LONG and trainer.strategy.root_device.type == "cpu":
                    log.warning("this run takes long because it uses a CPU; ctrl-C stops it. %s", self._advice)


def duration(seconds: float) -> str:
    """Return a duration in the unit in which it is at least 2, if there is one."""
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"

"""Checkpoints of a run: the one that it continues from, also after it was asked to stop, and those of every n steps."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from psp_lightning.utils.arguments import whole


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run continues bit for bit.

    Written every `every_n_steps` optimizer steps, at the last step, and when ctrl-C or SIGTERM asks the run to stop
    (the step in progress is finished first). Where a validation falls on the same step it is written after it, so that
    the best value is part of it.

    Args:
        folder: where `last.ckpt` is written.
        every_n_steps: optimizer steps between two checkpoints; None: only at the end and on a stop.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1, optional=True)
        self.interrupted = False
        self._asked, self._pending, self._step, self._ranks = False, False, -1, 1
        self._handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)
        self._ranks = trainer.world_size

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self._asked and self._ranks == 1:  # asked twice: stop at once
            raise KeyboardInterrupt
        if not self._asked:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print is not safe in a handler
        self._asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.interrupted = self._anywhere(trainer, self._asked)
        step = trainer.global_step
        if step == self._step:
            return  # gradients of half a step are not part of a checkpoint
        self._step = step
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        self._pending = bool(due or self.interrupted)
        batches = trainer.fit_loop.total_batch_idx + 1
        validates = trainer.enable_validation and batches % int(trainer.val_check_batch or 1) == 0
        if self._pending and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interrupted = self._anywhere(trainer, self._asked)
        if self._pending or (self.interrupted and trainer.global_step == self._step):
            self._save(trainer)

    @staticmethod
    def _anywhere(trainer: pl.Trainer, asked: bool) -> bool:
        """Whether any rank was asked: all of them stop at the same step or none does."""
        if trainer.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _save(self, trainer: pl.Trainer) -> None:
        self._pending = False
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path)
        if self.interrupted:
            trainer.should_stop = True


def step_checkpoints(folder: str | Path, every_n_steps: int | None) -> ModelCheckpoint:
    """Return a callback that keeps `step_00001000.ckpt` of every so many steps; None: of no step."""
    steps = whole("every_n_steps", every_n_steps, 1, optional=True) or 0
    return ModelCheckpoint(
        folder, "step_{step:08d}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=steps
    )

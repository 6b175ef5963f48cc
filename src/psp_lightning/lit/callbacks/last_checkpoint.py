"""Checkpoints of a run: `last.ckpt`, from which it resumes, and one every n steps."""

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
    """Writes `folder`/last.ckpt, from which a run resumes bit for bit.

    It is written every `every_n_steps` optimizer steps (None: never), at the last step, and when ctrl-C or SIGTERM
    stops the run, after the current step. If there is a validation at the same step, it is written after the
    validation, so that it includes the best value.
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
        if self._asked and self._ranks == 1:  # second request: stop at once
            raise KeyboardInterrupt
        if not self._asked:
            os.write(2, b"\nstopping after this step; press ctrl-C again to stop at once\n")  # print is unsafe here
        self._asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.interrupted = self._anywhere(trainer, self._asked)
        step = trainer.global_step
        if step == self._step:
            return  # a checkpoint cannot contain accumulated gradients
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
        """Return whether any rank was asked to stop: all ranks must stop at the same step."""
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
    """Return a callback that writes `step_00001000.ckpt` and so on every `every_n_steps` steps; None: never."""
    steps = whole("every_n_steps", every_n_steps, 1, optional=True) or 0
    return ModelCheckpoint(
        folder, "step_{step:08d}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=steps
    )

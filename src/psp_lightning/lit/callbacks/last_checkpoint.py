"""Checkpoints of a run: `last.ckpt`, from which it resumes, and one every n steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from psp_lightning.utils.arguments import whole


class LastCheckpoint(Checkpoint):
    """Writes `folder`/last.ckpt, from which a run resumes bit for bit.

    It is written every `every_n_steps` optimizer steps (None: never), and when the run ends: at the last step, when
    ctrl-C or SIGTERM stops it, and when another callback sets `trainer.should_stop`. The run then ends after the
    current step. If there is a validation at the same step, the checkpoint is written after the validation, so that it
    includes the best value.

    A run whose folder was moved or copied keeps its best values, see `on_load_checkpoint`.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1, optional=True)
        self.interrupted = False
        self._asked_at: float | None = None
        self._stop, self._pending, self._step, self._saved = False, False, -1, -1
        self._rank, self._ranks = 0, 1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        # Not in on_fit_start: Lightning would combine the handler of SIGTERM with its own, which tells the other ranks
        # in the middle of a step and waits for them, while they wait for its gradients.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)
        self._step = self._saved = trainer.global_step
        self._stop = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if self._rank == 0:  # print is unsafe in a signal handler
                os.write(2, b"\nstopping after this step; press ctrl-C again to stop at once\n")
        elif self._ranks == 1 or now - self._asked_at > 1:  # the launcher of several ranks repeats a terminal's signal
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.interrupted = self._anywhere(trainer)
        step = trainer.global_step
        self._stop = self._stop or trainer.should_stop
        if step == self._step:  # a checkpoint cannot contain accumulated gradients, so stop after the step
            trainer.should_stop = False
            return
        self._step = step
        trainer.should_stop = self._stop
        stops = self._stops(trainer)
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        self._pending = bool(due or self.interrupted or stops)
        batches = trainer.fit_loop.total_batch_idx + 1
        # Lightning validates a run that stops
        validates = trainer.enable_validation and (stops or batches % int(trainer.val_check_batch or 1) == 0)
        if self._pending and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interrupted = self._anywhere(trainer)
        stops = self.interrupted or self._stops(trainer)
        if self._pending or (stops and trainer.global_step == self._step):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved:  # for example, should_stop was set at the end of an epoch
            self._save(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace the paths of the best checkpoints if the run's folder was moved or copied.

        Otherwise, Lightning would forget the best values and overwrite the best checkpoint with the next one. It still
        does so if the best checkpoints were not moved with the folder.
        """
        states = checkpoint["callbacks"]
        for callback in trainer.checkpoint_callbacks:
            key = callback.state_key
            if isinstance(callback, ModelCheckpoint) and states.get(key, {}).get("dirpath") not in (
                None,
                callback.dirpath,
            ):
                moved = _move(states[key], str(callback.dirpath))
                if trainer.strategy.broadcast(all(map(os.path.isfile, moved["best_k_models"]))):
                    states[key] = moved

    @staticmethod
    def _stops(trainer: pl.Trainer) -> bool:
        """Return whether Lightning ends the run now: min_steps and min_epochs can delay that."""
        return trainer.should_stop and trainer.fit_loop._can_stop_early

    def _anywhere(self, trainer: pl.Trainer) -> bool:
        """Return whether any rank was asked to stop: all ranks must stop at the same step."""
        asked = self._asked_at is not None
        if trainer.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _save(self, trainer: pl.Trainer) -> None:
        self._pending, self._saved = False, trainer.global_step
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path)
        if self.interrupted:
            trainer.should_stop = True


def _move(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a `ModelCheckpoint` with `folder` in place of its own folder."""
    old = os.path.join(state["dirpath"], "")

    def move(path: str) -> str:
        return os.path.join(folder, path.removeprefix(old)) if path.startswith(old) else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    models = {move(path): score for path, score in state["best_k_models"].items()}
    return {**state, **{name: move(state[name]) for name in paths}, "best_k_models": models, "dirpath": folder}


def step_checkpoints(folder: str | Path, every_n_steps: int | None) -> ModelCheckpoint:
    """Return a callback that writes `step_00001000.ckpt` and so on every `every_n_steps` steps; None: never."""
    steps = whole("every_n_steps", every_n_steps, 1, optional=True) or 0
    return ModelCheckpoint(
        folder, "step_{step:08d}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=steps
    )

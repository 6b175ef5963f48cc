"""Callbacks: the last checkpoint and a graceful stop, image grids, the progress bar."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from psp_lightning.lit.callbacks.grids import image_grid
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.images import save_atomic, to_pil


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` such that a run continues from it bit for bit.

    Written every `every_n_steps` optimizer steps, at the last step, and when ctrl-C or SIGTERM asks the run to stop
    (the step in progress is finished first). Where a validation falls on the same step it is written after it, so that
    the best value is part of it.

    Args:
        folder: where `last.ckpt` is written.
        every_n_steps: optimizer steps between two writings; None: only at the end and on a stop.
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


class AverageBatchNorm(Callback):
    """Averages the encoder's running statistics over the ranks after each step.

    Without SyncBatchNorm every rank normalises by its own batch and keeps its own running statistics: a validation or a
    checkpoint would then be one rank's view of them.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.world_size == 1:
            return
        layers = [m for m in pl_module.net.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [layer for layer in layers if layer.training and not isinstance(layer, nn.SyncBatchNorm)]
        buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.all_reduce(flat)
        flat /= trainer.world_size
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


class ImageGrids(Callback):
    """Grids with a row source | target | output for each image, in the run directory and the image loggers.

    Args:
        folder: receives `train_00000100.png`, `val_00000100.png`.
        every_n_steps: steps between training grids (0: none); a validation always leaves one of its first batch.
        n_images: rows.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, n_images: int) -> None:
        self.folder = Path(folder)
        self.every_n_steps = whole("every_n_steps", every_n_steps, 0)
        self.n_images = whole("n_images", n_images, 1)
        self._drawn_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step and self.every_n_steps and step % self.every_n_steps == 0 and step != self._drawn_step:
            self._drawn_step = step
            self._draw(trainer, pl_module, "train", batch, outputs["y_hat"])

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if batch_idx == 0:
            self._draw(trainer, pl_module, "val", batch, outputs["y_hat"])

    def _draw(self, trainer: pl.Trainer, module: Any, stage: str, batch: Any, y_hat: Tensor) -> None:
        if not trainer.is_global_zero:
            return
        n = min(self.n_images, len(y_hat))
        output, target = y_hat[:n].detach().float(), batch["target"][:n].float()
        identity = module.losses.terms["id"] if "id" in module.losses.terms else None
        captions = None
        if identity is not None:
            with torch.no_grad():
                captions = [f"id {value:.2f}" for value in identity.similarity(output, target).tolist()]
        spec = trainer.datamodule.spec  # type: ignore[attr-defined]
        grid = to_pil(image_grid(batch["source"][:n], target, output, spec, captions))
        step = trainer.global_step
        save_atomic(grid, self.folder / f"{stage}_{step:08d}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # wandb; PIL, because it would cast float images to black
                logger.log_image(key=f"{stage}/images", images=[grid], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"{stage}/images", np.asarray(grid), step, dataformats="HWC")


class ProgressBar(TQDMProgressBar):
    """One bar for the whole run: steps, time left, the loss and its terms."""

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.reset(trainer.max_steps if trainer.max_steps > 0 else None)
        bar.initial = bar.n = trainer.global_step  # of a resumed run: the rest alone tells the time left
        bar.set_description("train")

    def on_train_epoch_start(self, *args: Any) -> None:
        """A pass over the data is no event for the bar."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if step > bar.n:
            bar.update(step - bar.n)
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/").removeprefix("loss_"): value for name, value in metrics.items()}

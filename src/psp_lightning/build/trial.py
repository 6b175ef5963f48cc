"""Make a few steps of a training, without writing anything, and measure what they take."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from psp_lightning.build.training import build_module
from psp_lightning.utils.devices import resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory, peak_memory, reset_peak_memory

STEPS = 3  # timed steps, after a first one, which is slower


@dataclass
class Trial:
    """What a training step takes.

    Attributes:
        seconds: per step.
        memory: peak in MiB of the tensors on a GPU, otherwise of the whole process; None if it is not known.
        device: `cpu`, `cuda:0` or `mps:0`.
    """

    seconds: float
    memory: float | None
    device: str


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        reset_peak_memory(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.ends or trainer.global_step > self.ends[-1][0]:
            self.ends.append((trainer.global_step, monotonic()))


def try_steps(cfg: DictConfig, data: Any) -> Trial:
    """Build the training of a configuration, and make a few steps on one device.

    Raises:
        UserError: the training cannot be built, a step fails, or it does not fit into the device's memory.
    """
    if computes_on_cpu(cfg.trainer.accelerator):
        keep_freed_memory()  # as the training does
    accelerator, devices = resolve_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    module, clock = build_module(cfg, data), _Clock()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices[:1] if isinstance(devices, list) else 1,
        precision=cfg.trainer.precision,
        accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        max_steps=1 + STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, data)
    except torch.OutOfMemoryError:
        raise UserError(
            f"a step of data.batch_size={cfg.data.batch_size} does not fit into the GPU's memory. Use a smaller batch "
            "with trainer.accumulate_grad_batches, trainer.precision=bf16-mixed or model.checkpointing=true."
        ) from None
    device = trainer.strategy.root_device
    (_, first), *_, (_, last) = clock.ends
    return Trial((last - first) / (len(clock.ends) - 1), peak_memory(device), str(device))

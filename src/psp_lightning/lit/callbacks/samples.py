"""Callbacks for training a generator: grids of samples, and the exported generator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from psp_lightning.checkpoints.weight_files import save_generator
from psp_lightning.lit.files import keep_picture
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.images import to_pil


@torch.no_grad()
def sample_images(generator: Generator, n: int, psi: float = 1.0, seed: int = 0, batch: int = 32) -> Tensor:
    """Return n samples (n, C, S, S) on the CPU, with constant noise and latents drawn from `seed`.

    `psi` truncates towards the mean w of 10,000 draws.
    """
    source = torch.Generator().manual_seed(seed)
    z = torch.randn(n, generator.z_dim, generator=source).to(generator.input["input"])
    centre = generator.latent_average(10_000) if psi != 1 else None
    return torch.cat([generator(part, psi, centre).cpu() for part in z.split(batch)])


def tile(images: Tensor, columns: int) -> Tensor:
    """Arrange images (n, C, S, S) in a grid (C, rows * S, columns * S); empty cells are white."""
    n, c, s, _ = images.shape
    rows = -(-n // columns)
    full = torch.ones(rows * columns, c, s, s)
    full[:n] = images.float().clamp(-1, 1)
    return full.view(rows, columns, c, s, s).permute(2, 0, 3, 1, 4).reshape(c, rows * s, columns * s)


class SampleGrids(Callback):
    """Draws grids of `n_images` samples (1 to 4096) of the averaged generator (`g_ema`), always for the same latents.

    It writes `folder`/samples_00000500.png every `every_n_steps` steps (0: never) and at the end. `truncation` is psi,
    from 0 to 10.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, n_images: int, truncation: float) -> None:
        self.folder, self.every_n_steps = Path(folder), whole("every_n_steps", every_n_steps, 0)
        self.n_images, self.truncation = whole("n_images", n_images, 1, 4096), number("truncation", truncation, 0, 10)
        self._drawn_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self._drawn_step or not trainer.is_global_zero:
            return
        self._drawn_step = step
        images = sample_images(pl_module.g_ema, self.n_images, self.truncation)
        grid = to_pil(tile(images, max(1, round(self.n_images**0.5))))
        keep_picture(trainer, grid, self.folder / f"samples_{step:08d}.png", "samples")


class ExportGenerator(Callback):
    """Writes the averaged generator to `run`/generator.safetensors when the run ends or is interrupted.

    Args:
        run: the run directory.
        every_n_steps: steps between further files such as `generator_00001000.safetensors`; None: no further files.
        origin: training data, licence and so on; the steps and the images shown are added.
    """

    def __init__(self, run: str | Path, every_n_steps: int | None, origin: Mapping[str, Any]) -> None:
        self.run, self.origin = Path(run), dict(origin)
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1, optional=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and trainer.is_global_zero:
            self._write(pl_module, f"generator_{step:08d}.safetensors", step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._write(pl_module, "generator.safetensors", trainer.global_step)

    def _write(self, module: Any, name: str, step: int) -> None:
        origin = {**self.origin, "steps": step, "images_shown": int(module.images_shown)}
        save_generator(self.run / name, module.g_ema, origin)

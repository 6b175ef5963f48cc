"""Image grids of a batch: source | target | output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from psp_lightning.data.spec import InputSpec, source_to_rgb
from psp_lightning.lit.files import keep_picture
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.images import from_uint8, to_pil

CAPTION_HEIGHT = 14  # pixels; one line in PIL's default font


class ImageGrids(Callback):
    """Draws grids of up to `n_images` rows source | target | output, for `folder` and the loggers that take images.

    `train_00000100.png` and so on show a training batch every `every_n_steps` steps (0: never; a shorter run: at its
    last step); `val_00000100.png` and so on show the first batch of every validation.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, n_images: int) -> None:
        self.folder = Path(folder)
        self.every_n_steps = whole("every_n_steps", every_n_steps, 0)
        self.n_images = whole("n_images", n_images, 1)
        self._drawn_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.every_n_steps
        due = every and (step % every == 0 or step == trainer.max_steps < every)
        if step and due and step != self._drawn_step:
            self._drawn_step = step
            self._draw(trainer, pl_module, "train", batch, outputs["y_hat"])

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if batch_idx == 0:
            self._draw(trainer, pl_module, "val", batch, outputs["y_hat"])

    def _draw(self, trainer: Any, module: Any, stage: str, batch: Any, y_hat: Tensor) -> None:
        if not trainer.is_global_zero:
            return
        n = min(self.n_images, len(y_hat))
        output, target = y_hat[:n].detach().float(), batch["target"][:n].float()
        captions = None
        if "id" in module.losses.terms:
            with torch.no_grad():
                similarity = module.losses.terms["id"].similarity(output, target)
            captions = [f"id {round(value, 2) + 0.0:.2f}" for value in similarity.tolist()]  # 0.00 rather than -0.00
        grid = to_pil(image_grid(batch["source"][:n], target, output, trainer.datamodule.spec, captions))
        path = self.folder / f"{stage}_{trainer.global_step:08d}.png"
        keep_picture(trainer, grid, path, f"{stage}/images")


def image_grid(
    source: Tensor, target: Tensor, output: Tensor, spec: InputSpec, captions: Sequence[str] | None = None
) -> Tensor:
    """Draw one row source | target | output per sample; return (3, B * (S + caption), 3 * S) float32 in [-1, 1].

    A line above the columns names them if they are wide enough, from S = 48 on.

    Args:
        source: (B, C, H, W), resized to the target's size.
        target: (B, 3, S, S) in [-1, 1].
        output: (B, 3, S, S), clamped to [-1, 1] here.
        spec: describes the source.
        captions: one text per row, written below its output.
    """
    size = target.shape[-2:]
    shown = F.interpolate(source_to_rgb(source, spec), size=size, mode="nearest")
    rows = torch.cat([shown, target.cpu(), output.cpu().clamp(-1, 1)], dim=3)  # (B, 3, S, 3S)
    if captions is not None:
        rows = torch.cat([rows, torch.stack([_line(("", "", text), rows.shape[-1]) for text in captions])], dim=2)
    header = [_line(("source", "target", "output"), rows.shape[-1])] if size[1] >= 48 else []
    return torch.cat([*header, *rows], dim=1)


def _line(texts: Sequence[str], width: int) -> Tensor:
    """Draw one line with a text for each of the three columns."""
    strip = Image.new("RGB", (width, CAPTION_HEIGHT))
    for column, text in enumerate(texts):
        ImageDraw.Draw(strip).text((column * width // 3 + 2, 1), text, fill=(255, 255, 255))
    return from_uint8(torch.from_numpy(np.array(strip)).permute(2, 0, 1))

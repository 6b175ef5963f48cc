"""Pictures of a batch: source | target | output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from psp_lightning.data.spec import InputSpec
from psp_lightning.data.transforms import spec_label_map
from psp_lightning.utils.images import from_uint8

CAPTION_HEIGHT = 14  # pixels, one line of PIL's default font


def source_to_rgb(source: Tensor, spec: InputSpec) -> Tensor:
    """A source batch as something to look at.

    Args:
        source: (B, C, H, W) as `spec` says.
        spec: its kind; label maps take their colours from it.

    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    """
    source = source.detach().float().cpu()
    if spec.kind == "sketch":
        return source.expand(-1, 3, -1, -1) * 2 - 1
    if spec.kind == "labels":
        palette = torch.tensor(spec_label_map(spec).colors)  # (n_classes, 3)
        return from_uint8(palette[source.argmax(dim=1)].permute(0, 3, 1, 2))
    return source[:, :3]


def image_grid(
    source: Tensor, target: Tensor, output: Tensor, spec: InputSpec, captions: Sequence[str] | None = None
) -> Tensor:
    """One row source | target | output for each sample.

    Args:
        source: (B, C, H, W); resized to the target's size.
        target: (B, 3, S, S) in [-1, 1].
        output: (B, 3, S, S), clamped here.
        spec: what the source is.
        captions: one text a row, written below its output.

    Returns:
        (3, B * (S + caption), 3 * S) float32 in [-1, 1].
    """
    size = target.shape[-2:]
    shown = F.interpolate(source_to_rgb(source, spec), size=size, mode="nearest")
    rows = torch.cat([shown, target.cpu(), output.cpu().clamp(-1, 1)], dim=3)  # (B, 3, S, 3S)
    if captions is not None:
        rows = torch.cat([rows, torch.stack([_caption(text, rows.shape[-1]) for text in captions])], dim=2)
    return torch.cat(list(rows), dim=1)


def _caption(text: str, width: int) -> Tensor:
    strip = Image.new("RGB", (width, CAPTION_HEIGHT))
    ImageDraw.Draw(strip).text((2 * width // 3 + 2, 1), text, fill=(255, 255, 255))
    return from_uint8(torch.from_numpy(np.array(strip)).permute(2, 0, 1))

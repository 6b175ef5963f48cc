"""Holes for inpainting: boxes, brush strokes, halves or files, as bool (H, W) in which True is missing."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from psp_lightning.data.pairing import list_images
from psp_lightning.data.transforms import open_image
from psp_lightning.utils.errors import UserError, suggest

SHAPES = ("box", "brush", "half", "file", "random")


def box_mask(size: int, rng: np.random.Generator, low: float = 0.25, high: float = 0.5) -> np.ndarray:
    """Return a rectangle inside the image, with sides of `low` to `high` of the image's side."""
    height, width = np.maximum(1, (size * rng.uniform(low, high, 2)).round()).astype(int).clip(max=size)
    top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    mask = np.zeros((size, size), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def half_mask(size: int, rng: np.random.Generator, side: str = "any") -> np.ndarray:
    """Return the `left`, `right`, `top` or `bottom` half, or a random one for `any`."""
    sides = ("left", "right", "top", "bottom")
    if side not in (*sides, "any"):
        raise UserError(f"Unknown side {side!r} of a half mask. Known: any, {', '.join(sides)}.{suggest(side, sides)}")
    side = str(rng.choice(sides)) if side == "any" else side
    row, column = np.mgrid[:size, :size]
    half = size // 2
    parts = {"left": column < half, "right": column >= size - half, "top": row < half, "bottom": row >= size - half}
    return parts[side]


def brush_mask(size: int, rng: np.random.Generator, strokes: int = 3, width: float = 0.12) -> np.ndarray:
    """Return up to `strokes` wandering strokes, about `width` of the image's side thick."""
    image = Image.new("1", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, strokes + 1))):
        thick = max(1.0, size * width * rng.uniform(0.6, 1.4))
        angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.7, 8))
        step = size * rng.uniform(0.05, 0.14)
        path = rng.uniform(0.2, 0.8, 2) * size + np.cumsum(step * np.stack([np.cos(angle), np.sin(angle)], -1), 0)
        path = path.clip(0, size - 1)
        draw.line([(float(x), float(y)) for x, y in path], fill=1, width=round(thick), joint="curve")
        for x, y in path:  # round ends
            draw.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=1)
    return np.array(image)


def as_mask(mask: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Return a mask image or array of any size as bool (size, size). The upper half of the value range is missing."""
    if isinstance(mask, np.ndarray):
        array = mask.squeeze()
        half = 0.5 if array.dtype.kind == "f" or array.max() <= 1 else 128
        bright = array if array.dtype == bool else array >= half
        mask = Image.fromarray(bright.astype(np.uint8) * 255)
    elif mask.mode == "1":
        mask = mask.convert("L")
    else:
        values = np.asarray(mask.convert("RGB") if mask.mode == "P" else mask).astype(np.float32)
        values = values[..., :3].mean(-1) if values.ndim == 3 else values
        top = 1 if values.max() <= 1 else 65535 if mask.mode.startswith("I") else 255
        mask = Image.fromarray((values >= top / 2).astype(np.uint8) * 255)
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 127


@functools.lru_cache(maxsize=8)
def _mask_files(folder: str) -> list[Path]:
    return list_images(folder, "mask folder")


def file_mask(size: int, rng: np.random.Generator, folder: str) -> np.ndarray:
    """Return a random mask file of `folder` or its subfolders. Bright pixels are missing."""
    files = _mask_files(os.fspath(folder))
    return as_mask(open_image(files[int(rng.integers(len(files)))], "mask"), size)


def draw_mask(size: int, rng: np.random.Generator, kind: str = "box", **options: Any) -> np.ndarray:
    """Return a random hole, bool (size, size), in which True is missing.

    Args:
        kind: `box` (options low, high), `brush` (strokes, width), `half` (side), `file` (folder), or `random` for one
            of the first three with default options.

    Raises:
        UserError: if the kind or an option is unknown.
    """
    if kind not in SHAPES:
        raise UserError(f"Unknown mask kind {kind!r}. Known: {', '.join(SHAPES)}.{suggest(kind, SHAPES)}")
    if kind == "random":
        kind = ("box", "brush", "half")[int(rng.integers(3))]
    maker = {"box": box_mask, "brush": brush_mask, "half": half_mask, "file": file_mask}[kind]
    try:
        return maker(size, rng, **options)  # type: ignore[operator]
    except TypeError as error:
        raise UserError(f"Mask kind {kind!r}: {error}.") from None

"""Holes for inpainting, as bool (H, W) in which True is missing: boxes, brush strokes, halves, files, transparency.

Every mode of Pillow is read by one of two rules:

- A picture with a hole (`transparent_hole`): pixels with less than half of the full opacity are missing, whether the
  transparency is an alpha channel, a palette entry or PNG's single transparent colour.
- A mask (`as_mask`): bright pixels are missing, the upper half of the value range. The range is 0..1, 0..255 or
  0..65535, the smallest that contains the largest value, whatever the bit depth of the file. If a mask is partly
  transparent and what is painted has one tone, the shape is in the transparency: what is painted is missing.
  A mask with colours, with several tones beside transparency, or with values that are not zero but all in the lower
  half is rejected, because it can be read in more than one way.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from psp_lightning.data.pairing import list_images
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.pictures import ImageLike, name_of, opacity, open_image, to_rgba

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


TONES = 64  # levels of 255 by which the channels of a grey pixel, and painted pixels of one tone, may differ


def transparent_hole(image: Image.Image, size: int) -> np.ndarray | None:
    """Return the transparent pixels of a picture as bool (size, size), or None if it has none."""
    alpha = opacity(image)
    if alpha is None or alpha.min() >= 128:
        return None
    return np.asarray(Image.fromarray(alpha).resize((size, size))) < 128


def as_mask(mask: ImageLike | np.ndarray, size: int) -> np.ndarray:
    """Return a mask of any size as bool (size, size). The module's docstring describes the rule.

    Args:
        mask: path, PIL image or array (H, W).
        size: height and width of the result.

    Raises:
        UserError: if the mask cannot be read, or can be read in more than one way. The message names the file.
    """
    try:
        hole = _bright(mask.squeeze()) if isinstance(mask, np.ndarray) else _read_mask(open_image(mask, "mask"))
    except _UnclearMask as error:
        name = "mask" if isinstance(mask, np.ndarray) else f"Mask {name_of(mask)}"
        raise UserError(f"{name}: {error}. Save it in grey: white is missing, black is kept.") from None
    return np.asarray(Image.fromarray(hole.astype(np.uint8) * 255).resize((size, size), Image.Resampling.NEAREST)) > 127


class _UnclearMask(Exception):
    """A mask that can be read in several ways, or in no way."""


def _read_mask(image: Image.Image) -> np.ndarray:
    rgba = to_rgba(image)
    levels = None if rgba is None else np.asarray(rgba).astype(np.int64)
    if levels is not None and levels[..., 3].min() < 128:
        painted = levels[..., 3] >= 128
        if not painted.any():
            raise _UnclearMask("all of it is transparent")
        if np.ptp(levels[painted], axis=0)[:3].max() > TONES:
            raise _UnclearMask("it has transparent pixels and several tones")
        return painted
    if image.mode in ("1", "L", "F") or image.mode[0] == "I":
        return _bright(np.asarray(image))
    if levels is None:
        levels = np.asarray(image.convert("RGB")).astype(np.int64)
    if np.ptp(levels[..., :3], axis=-1).max() > TONES:
        raise _UnclearMask("it has colours")
    return _bright(levels[..., :3].mean(-1))


def _bright(values: np.ndarray) -> np.ndarray:
    """Return the upper half of the value range of (H, W) numbers."""
    if values.ndim != 2:
        raise _UnclearMask(f"its shape {values.shape} is not (height, width)")
    low, high = float(values.min()), float(values.max())
    top = next((top for top in (1, 255, 65535) if high <= top), None)
    if top is None or not low >= 0:
        raise _UnclearMask(f"its values from {low:g} to {high:g} are not in 0..1, 0..255 or 0..65535")
    if 0 < high < top / 2:
        raise _UnclearMask(f"its brightest pixel, {high:g} of {top}, is in the lower half of the range")
    return values >= top / 2


@functools.lru_cache(maxsize=8)
def _mask_files(folder: str) -> list[Path]:
    return list_images(folder, "mask folder")


def file_mask(size: int, rng: np.random.Generator, folder: str) -> np.ndarray:
    """Return a random mask file of `folder` or its subfolders. Bright pixels are missing."""
    files = _mask_files(os.fspath(folder))
    return as_mask(files[int(rng.integers(len(files)))], size)


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

"""Conversion between float images in [-1, 1] and 8-bit images with one rounding rule, and atomic writing of images."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from psp_lightning.utils.atomic import replacing

# suffixes of written images, and Pillow's options for them
FORMATS: dict[str, dict[str, Any]] = {"png": {"compress_level": 3}, "jpg": {"quality": 95}, "webp": {"quality": 95}}


def to_uint8(image: Tensor) -> Tensor:
    """Convert float (..., H, W) in [-1, 1] to uint8 (..., H, W): clamp, scale to [0, 255], round half to even."""
    return (image.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(image: Tensor) -> Tensor:
    """Convert uint8 (..., H, W) to float32 in [-1, 1]; the inverse of `to_uint8` on its 256 levels."""
    return image.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """Convert (3, H, W) or (1, H, W), float in [-1, 1] or uint8, to a PIL image of mode RGB or L."""
    array = (image if image.dtype == torch.uint8 else to_uint8(image)).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_atomic(image: Image.Image, path: str | os.PathLike[str], **options: object) -> None:
    """Write `image` to `path` atomically, in the format of its suffix.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is left unchanged.
    """
    with replacing(path, sync=False) as part:
        image.save(part, format=Image.registered_extensions()[part.suffix.lower()], **options)

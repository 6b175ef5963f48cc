"""Conversion of images to tensors, with the numbers of the reference (eladrich/pixel2style2pixel, commit 5cfff38).

Every picture first becomes 8-bit RGB or grey: the EXIF orientation is applied, 16-bit values are divided by 257,
palettes are resolved, transparency is composited over white, and Pillow converts CMYK and other modes. The picture is
then squashed to a square, as in the reference.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from psp_lightning.data.labels import IGNORED, NO_CLASS, LabelMap
from psp_lightning.utils.compat import moved
from psp_lightning.utils.errors import UserError

ImageLike = str | os.PathLike[str] | Image.Image
BILINEAR = Image.Resampling.BILINEAR


def open_image(source: ImageLike, what: str = "image") -> Image.Image:
    """Decode a picture and apply its EXIF orientation.

    Args:
        source: path or PIL image.
        what: noun for messages.

    Raises:
        UserError: if the file is missing, truncated or not an image. The message names it.
    """
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    try:
        with Image.open(source) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UserError(f"{what.capitalize()} {source} does not exist.") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot read {what} {source}: {error}. Replace or remove the file.") from None


def to_8bit(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `RGB` or `L` by the rules in the module's docstring."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise UserError("Floating-point pixels have no defined range. Save the image with 8 or 16 bits per channel.")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # type: ignore[index,misc]
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def open_8bit(source: ImageLike, mode: str) -> Image.Image:
    """Decode a picture, apply its EXIF orientation and convert it to `RGB` or `L`.

    Raises:
        UserError: if the picture cannot be read or converted. The message names the file.
    """
    try:
        return to_8bit(open_image(source), mode)
    except UserError as error:
        raise error if str(name_of(source)) in str(error) else UserError(f"{name_of(source)}: {error}") from None


def name_of(source: ImageLike) -> str:
    """Return the picture's name for messages."""
    return (getattr(source, "filename", "") or "image") if isinstance(source, Image.Image) else str(source)


def _to_tensor(image: Image.Image) -> Tensor:
    """Return an 8-bit image as float32 (C, H, W) in [0, 1]."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous().float().div(255)


def rgb(source: ImageLike, size: int) -> Tensor:
    """Return float32 (3, size, size) in [-1, 1], resized bilinearly (with Pillow's antialiasing)."""
    return _to_tensor(open_8bit(source, "RGB").resize((size, size), BILINEAR)).sub(0.5).div(0.5)


def sketch(source: ImageLike, size: int) -> Tensor:
    """Return float32 (1, size, size) in [0, 1]; paper is 1, ink is 0."""
    return _to_tensor(open_8bit(source, "L").resize((size, size), BILINEAR))


def read_labels(source: ImageLike, label_map: LabelMap) -> np.ndarray:
    """Return the ids of a label image, int64 (H, W).

    The values of a single channel, or the indices of a palette, are the ids. Colours are looked up in the map.

    Raises:
        UserError: if a colour is not in the map.
    """
    image = open_image(source)
    if image.mode not in ("RGB", "RGBA", "CMYK", "YCbCr"):
        array = np.asarray(image)
        return array[..., 0].astype(np.int64) if array.ndim == 3 else array.astype(np.int64)
    array = np.asarray(image.convert("RGB")).astype(np.int64)
    if (array == array[..., :1]).all() and array.max() in label_map.ids:
        return array[..., 0]
    code = array @ np.array([65536, 256, 1])
    wanted = np.array(label_map.colors, np.int64) @ np.array([65536, 256, 1])
    order = np.argsort(wanted)
    place = np.searchsorted(wanted[order], code).clip(max=len(wanted) - 1)
    if (wrong := wanted[order][place] != code).any():
        y, x = np.argwhere(wrong)[0]
        raise UserError(
            f"{name_of(source)}: the colour {tuple(array[y, x].tolist())} at row {y}, column {x} is not in the label "
            "map. A label image must contain class ids in a single channel, or exactly the colours of the label map."
        )
    return np.array(label_map.ids, np.int64)[order][place]


def one_hot(ids: np.ndarray, label_map: LabelMap, name: str = "label image") -> Tensor:
    """Return integer ids (H, W) as float32 (len(label_map), H, W) of zeros and ones.

    Raises:
        UserError: if an id is outside the map. The message contains `name`, the id and its position.
    """
    known = (ids >= 0) & (ids < 65536)
    channel = np.where(known, label_map.lookup()[np.where(known, ids, 0)], NO_CLASS)
    if (wrong := channel == NO_CLASS).any():
        y, x = np.argwhere(wrong)[0]
        raise UserError(
            f"{name}: label id {int(ids[y, x])} at row {y}, column {x} ({int(wrong.sum())} pixels) is outside the "
            f"label map ({len(label_map)} classes, ids {min(label_map.ids)}..{max(label_map.ids)}). Use the label map "
            "that the images were made with, or list the id under 'ignore' in the label-map file."
        )
    index = torch.from_numpy(channel.astype(np.int64))
    planes = F.one_hot(index.where(index != IGNORED, len(label_map)), len(label_map) + 1)
    return planes[..., : len(label_map)].permute(2, 0, 1).float().contiguous()


def labels(source: ImageLike, size: int, label_map: LabelMap, interpolation: str = "nearest") -> Tensor:
    """Return the one-hot labels, float32 (len(label_map), size, size).

    `legacy_bilinear` resizes the ids as if they were grey values, as the reference does. At edges this creates ids of
    unrelated classes.
    """
    ids, name = read_labels(source, label_map), name_of(source)
    planes = one_hot(ids, label_map, name)  # reports an id outside the map even if resizing drops it
    if ids.shape == (size, size):
        return planes
    legacy = interpolation == "legacy_bilinear"
    resized = Image.fromarray(ids.astype(np.uint8 if legacy else np.int32)).resize(
        (size, size), BILINEAR if legacy else Image.Resampling.NEAREST
    )
    return one_hot(np.asarray(resized).astype(np.int64), label_map, name)


@functools.lru_cache(maxsize=64)
def _bicubic_taps(factor: int) -> Tensor:
    """Return Keys' cubic kernel with a = -0.5, sampled between the pixels and summing to 1: float32 (4 * factor,).

    Source: Keys, "Cubic convolution interpolation for digital image processing", eq. 15.
    """
    x = ((torch.arange(4 * factor, dtype=torch.float64) - 2 * factor + 0.5) / factor).abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    # Rounded before normalisation, as in the reference: this determines the 8-bit level of a flat picture.
    taps = taps.float()
    return taps / taps.sum()


def bicubic_down(image: Tensor, factor: int) -> Tensor:
    """Down-sample (C, H, W) to (C, H // factor, W // factor) by strided separable convolution with mirrored borders.

    As in the reference, factor 1 also filters (four taps, shifted by half a pixel).
    """
    n, taps = image.shape[0], _bicubic_taps(factor)
    before, after = (3 * factor) // 2, 3 * factor - (3 * factor) // 2
    x = image[None]
    for dim in (2, 3):
        # F.pad cannot mirror borders wider than the image
        length = x.shape[dim]
        index = torch.arange(-before, length + after) % max(2 * length - 2, 1)
        x = x.index_select(dim, torch.where(index < length, index, 2 * length - 2 - index))
        shape, stride = ((n, 1, -1, 1), (factor, 1)) if dim == 2 else ((n, 1, 1, -1), (1, factor))
        x = F.conv2d(x, taps.repeat(n).view(shape), stride=stride, groups=n)
    return x[0]


def lowres(source: ImageLike, size: int, factor: int) -> Tensor:
    """Return float32 (3, size, size) in [-1, 1]: resized, down-sampled by `factor` (bicubic), up-sampled (bilinear)."""
    small = bicubic_down(_to_tensor(open_8bit(source, "RGB").resize((size, size), BILINEAR)), factor).clamp(0, 1)
    array = small.mul(255).byte().permute(1, 2, 0).numpy()  # truncated, not rounded, as in the reference
    return rgb(Image.fromarray(array), size)


def masked(image: Tensor, hole: np.ndarray) -> Tensor:
    """Return (4, H, W): the image (3, H, W) in [-1, 1] with 0 in the hole, and the bool hole (H, W) as 0 and 1."""
    plane = torch.from_numpy(np.ascontiguousarray(hole)).float()[None]
    return torch.cat([image * (1 - plane), plane])


def __getattr__(name: str) -> Any:
    return moved(__name__, name)

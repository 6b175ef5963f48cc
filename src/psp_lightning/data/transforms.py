"""Conversion of images to tensors, with the numbers of the reference (eladrich/pixel2style2pixel, commit 5cfff38).

Every picture first becomes 8-bit RGB or grey, as `psp_lightning.utils.pictures` describes. It is then squashed to a
square, as in the reference.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from psp_lightning.data.labels import IGNORED, NO_CLASS, LabelMap
from psp_lightning.utils.compat import moved
from psp_lightning.utils.errors import UserError, plural
from psp_lightning.utils.pictures import ImageLike, name_of, open_8bit, open_image

BILINEAR = Image.Resampling.BILINEAR


def _to_tensor(image: Image.Image) -> Tensor:
    """Return an 8-bit image as float32 (C, H, W) in [0, 1]."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous().float().div(255)


def rgb(source: ImageLike, size: int | tuple[int, int]) -> Tensor:
    """Return float32 (3, size, size) in [-1, 1], resized bilinearly (with Pillow's antialiasing).

    `size` may also be (width, height).
    """
    size = (size, size) if isinstance(size, int) else size
    return _to_tensor(open_8bit(source, "RGB").resize(size, BILINEAR)).sub(0.5).div(0.5)


def sketch(source: ImageLike, size: int) -> Tensor:
    """Return float32 (1, size, size) in [0, 1]; paper is 1, ink is 0."""
    return _to_tensor(open_8bit(source, "L").resize((size, size), BILINEAR))


# Formats that keep every pixel value (TIFF and WebP can also be lossy, GIF and other palettes are checked by colour).
LOSSLESS = ("PNG", "TIFF", "BMP", "DIB", "PPM", "TGA", "PCX", "SGI", "QOI", "GIF", "WEBP")


def check_lossless(image: Image.Image, source: ImageLike) -> None:
    """Raise a UserError if a label image, opened from `source`, is compressed with loss."""
    lossy = image.format not in (None, *LOSSLESS) or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    if image.format == "WEBP" and not isinstance(source, Image.Image):
        lossy = b"VP8 " in Path(source).read_bytes()  # the chunk of lossy pixels; VP8L has lossless ones
    if lossy:
        raise UserError(
            f"{name_of(image)}: compression as in {image.format} files changes label ids. Save label images as PNG, "
            "from the original ids."
        )


def _ids_of_colours(colours: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """Return the id of each RGB colour (..., 3), -1 for colours that are not in the map."""
    place = np.array([65536, 256, 1])
    code, known = colours @ place, np.array(label_map.colors, np.int64) @ place
    order = np.argsort(known)
    at = np.searchsorted(known[order], code).clip(max=len(known) - 1)
    return np.where(known[order][at] == code, np.array(label_map.ids, np.int64)[order][at], -1)


def _read_palette(image: Image.Image, label_map: LabelMap) -> np.ndarray:
    """Return the ids of an image with a palette, int64 (H, W). `read_labels` describes the rule."""
    index = np.asarray(image).astype(np.int64)
    index = index[..., 0] if index.ndim == 3 else index
    palette = np.zeros((256, 3), np.int64)
    given = np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3)
    palette[: len(given)] = given
    used = np.flatnonzero(np.bincount(index.ravel()))
    colours = palette[used]
    own = dict(zip(label_map.ids, label_map.colors, strict=True))
    if all(own.get(i) == tuple(colour) for i, colour in zip(used.tolist(), colours.tolist(), strict=True)):
        return index
    by_colour = _ids_of_colours(colours, label_map)
    grey = (colours == colours[:, :1]).all() and len(np.unique(colours)) == len(used)
    ids = np.arange(256)
    if (by_colour >= 0).all():
        ids[used] = by_colour
    elif image.format == "GIF":
        if not grey:
            raise UserError(
                f"{name_of(image)}: GIF files renumber their palettes, and these colours are not the label map's. "
                "Save label images as PNG."
            )
        ids[used] = colours[:, 0]
    else:
        shade = np.where(np.isin(colours[:, 0], label_map.ids) & grey, colours[:, 0], -1)
        other = np.where(by_colour >= 0, by_colour, shade)
        if len(wrong := used[(other >= 0) & (other != used)]):
            raise UserError(
                f"{name_of(image)}: palette index {wrong[0]} has the colour of class "
                f"{other[used == wrong[0]][0]}, so the ids are unclear. Save the label image with a single channel "
                "whose values are the ids."
            )
    return ids[index]


def read_labels(source: ImageLike, label_map: LabelMap) -> np.ndarray:
    """Return the ids of a label image, int64 (H, W).

    - The values of a single channel are the ids, even if they are stored three times, as RGB.
    - Other colours must be the map's.
    - A palette is read by its colours if those in use are the map's; otherwise its indices are the ids. GIF files
      renumber palettes, so they need the map's colours, or shades of grey that are the ids.

    Raises:
        UserError: if a colour is not in the map, a palette's colours contradict its indices, values are not whole
            numbers, or the file's compression is lossy.
    """
    image = open_image(source, "label image")
    check_lossless(image, source)
    if image.mode in ("P", "PA"):
        return _read_palette(image, label_map)
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode[0] == "I":
        array = np.asarray(image)
        array = array[..., 0] if array.ndim == 3 else array
        if array.dtype.kind == "f" and not (np.isfinite(array) & (array == array.round())).all():
            raise UserError(f"{name_of(image)}: the pixels are not whole numbers. Save label ids as 8 or 16 bits.")
        return array.astype(np.int64)
    array = np.asarray(image.convert("RGB")).astype(np.int64)
    grey = (array == array[..., :1]).all()
    if grey and array.max() in label_map.ids:
        return array[..., 0]
    ids = _ids_of_colours(array, label_map)
    if (wrong := ids < 0).any():
        if grey:
            return array[..., 0]  # ids, some of which are ignored or outside the map
        y, x = np.argwhere(wrong)[0]
        raise UserError(
            f"{name_of(image)}: the colour {tuple(array[y, x].tolist())} at row {y}, column {x} is not in the label "
            "map. A label image must contain class ids in a single channel, or exactly the colours of the label map."
        )
    return ids


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
            f"{name}: label id {int(ids[y, x])} at row {y}, column {x} ({plural(int(wrong.sum()), 'pixel')}) is "
            f"outside the label map ({len(label_map)} classes, ids {min(label_map.ids)}..{max(label_map.ids)}). "
            "Use the label map that the images were made with, or list the id under 'ignore' in the label-map file."
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
    """Return Keys' cubic kernel with a = -0.5, sampled between the pixels, with sum 1: float32 (4 * factor,).

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

"""Plain images for generator training: files or drawings, one size, uint8 in memory."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

from psp_lightning.data.pairing import list_images
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.data.transforms import open_8bit, to_8bit
from psp_lightning.utils.arguments import ArgumentError, choice, whole
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8

FITS = ("squash", "pad", "crop")


def _is_power_of_two(size: int) -> bool:
    return size >= 8 and not size & (size - 1)


def _check_size(size: int) -> int:
    size = whole("size", size)
    if not _is_power_of_two(size):
        raise ArgumentError("size", size, f"must be a power of two from 8, for example {_nearest_power(size)}.")
    return size


def _nearest_power(size: int) -> int:
    return 1 << max(3, round(math.log2(max(size, 1))))


class ImageSet(Dataset[dict[str, Any]], ABC):
    """Images of one size. Items, by (epoch, index): `image` float32 (3, size, size) in [-1, 1], `path`.

    Args:
        size: height and width.
        flip: mirror with probability 0.5, by (seed, epoch, index).
        seed: of the flips.
        cache: keep every decoded image in memory, as uint8.
    """

    def __init__(self, size: int, flip: bool = False, seed: int = 0, cache: bool = False) -> None:
        self.size, self.flip, self.seed = _check_size(size), flip, seed
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 (size, size, 3)."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return what the image is called in messages."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self._cache is None:
            array = self.pixels(index)
        else:
            if index not in self._cache:
                self._cache[index] = self.pixels(index)
            array = self._cache[index]
        image = from_uint8(torch.from_numpy(array).permute(2, 0, 1).contiguous())
        if self.flip and np.random.default_rng([self.seed, 3, epoch, index]).random() < 0.5:
            image = image.flip(-1)
        return {"image": image, "path": self.path(index)}


class FolderImages(ImageSet):
    """Every image below a folder.

    Args:
        root: searched with its subfolders.
        size: None takes the images' own, which must then be one and a power of two.
        fit: how images of another shape are fitted: `squash` (both sides scaled to `size`), `pad` (scaled to fit, the
            rest filled by the nearest edge), `crop` (scaled to cover, the centre is kept). None: they are an error.
        limit: use only the first so many.

    Pictures are turned upright by their EXIF entry; grey ones become RGB; transparent pixels are put on white; 16 bits
    become 8; an animation gives its first picture. All headers are read when the set is made, so that a file that is
    no image is found before anything is trained; a file whose pixels turn out to be damaged later is an error that
    names it.

    Raises:
        UserError: no images; a file that is none, or has floating-point pixels; several sizes and no `fit`; a size that
            is no power of two.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        size: int | None = None,
        fit: str | None = None,
        limit: int | None = None,
        **options: Any,
    ) -> None:
        if root is None:
            raise UserError("data.root=DIR must be given: the folder with the training images (or domain=toyfaces).")
        self.fit = None if fit is None else choice("fit", fit, FITS)
        self.files = list_images(root)[: whole("limit", limit, 1, optional=True)]
        size = None if size is None else _check_size(size)
        if fit is not None and size is None:
            raise UserError("data.fit needs the size to fit to: domain.size=64 (a power of two).")
        sizes = [_header_size(path) for path in self.files]
        if fit is None:
            size = self._common_size(sizes, size)
        assert size is not None
        super().__init__(size, **options)

    def _common_size(self, sizes: list[tuple[int, int]], wanted: int | None) -> int:
        """Return the one size of all files."""
        advice = "Say how to fit: data.fit=squash, pad or crop, with domain.size=N, a power of two."
        first = sizes[0]
        for path, size in zip(self.files, sizes, strict=True):
            said = f"{path} has {size[0]}x{size[1]} pixels"
            if size != first:
                raise UserError(f"{said}, {self.files[0]} has {first[0]}x{first[1]}. {advice}")
            if size[0] != size[1]:
                raise UserError(f"{said}, which is no square. {advice}")
            if wanted is not None and size[0] != wanted:
                raise UserError(f"{said}, and domain.size={wanted}. {advice}")
        if not _is_power_of_two(first[0]):
            raise UserError(
                f"{self.files[0]} has {first[0]}x{first[1]} pixels; a network's size is a power of two from 8. "
                f"Say how to fit: data.fit=squash, pad or crop, with domain.size={_nearest_power(first[0])}."
            )
        return first[0]

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return str(self.files[index])

    def pixels(self, index: int) -> np.ndarray:
        return np.array(fit_image(open_8bit(self.files[index], "RGB"), self.size, self.fit or "squash"))


def _header_size(path: Path) -> tuple[int, int]:
    """Return width and height as the picture is seen: EXIF may turn it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.mode == "F":
                raise ValueError("floating-point pixels have no stated range")
            told = "exif" in image.info or image.format == "TIFF"  # of others `getexif` would decode the whole file
            turned = told and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as an image ({reason}); remove it or replace it.") from None
    return (height, width) if turned else (width, height)


def fit_image(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Return an RGB image of `size` x `size` pixels; see `FolderImages` for `fit`."""
    image = to_8bit(image, "RGB")
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if fit == "squash":
        return image.resize((size, size), Image.Resampling.LANCZOS)
    scale = size / (min if fit == "crop" else max)(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (size - width) // 2, (size - height) // 2
    if fit == "crop":
        return image.crop((-left, -top, size - left, size - top))
    margins = ((top, size - height - top), (left, size - width - left), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), margins, mode="edge"))


class ToyFacesImages(ImageSet):
    """Faces drawn from a seed, see `ToyFaces`.

    Args:
        n: number of faces.
        toy_seed: another seed, other faces.
    """

    def __init__(self, size: int = 64, n: int = 50_000, toy_seed: int = 1, limit: int | None = None, **options: Any):
        super().__init__(size, **options)
        limit = whole("limit", limit, 1, optional=True)
        self.faces = ToyFaces(self.size, toy_seed, n if limit is None else min(n, limit))

    def __len__(self) -> int:
        return len(self.faces)

    def path(self, index: int) -> str:
        return self.faces.path(index)

    def pixels(self, index: int) -> np.ndarray:
        return self.faces.draw(index).image

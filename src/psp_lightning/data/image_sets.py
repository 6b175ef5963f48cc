"""Images for generator training, from files or drawn, all of one size and uint8 in memory."""

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
from psp_lightning.utils.arguments import ArgumentError, choice, whole
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8
from psp_lightning.utils.pictures import open_8bit, to_8bit

FITS = ("squash", "pad", "crop")


def _nearest_power(size: int) -> int:
    """Return the power of two, at least 8, that is closest to `size`."""
    return 1 << max(3, round(math.log2(max(size, 1))))


def _check_size(size: int) -> int:
    size = whole("size", size)
    if size != _nearest_power(size):
        raise ArgumentError("size", size, f"must be a power of two, at least 8, for example {_nearest_power(size)}.")
    return size


class ImageSet(Dataset[dict[str, Any]], ABC):
    """Images of one size. Items contain `image`, float32 (3, size, size) in [-1, 1], and `path`.

    The key is (epoch, index), or just an index for epoch 0.

    Args:
        size: height and width, a power of two, at least 8.
        flip: mirror with probability 0.5, determined by (seed, epoch, index).
        seed: seed of the flips.
        cache: keep every decoded image in memory, as uint8.
    """

    def __init__(self, size: int, flip: bool = False, seed: int = 0, cache: bool = False) -> None:
        self.size, self.flip, self.seed = _check_size(size), flip, seed
        self.cache = cache
        self._cached: dict[int, np.ndarray] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """Return uint8 (size, size, 3)."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return the image's name for messages."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        array = self._cached[index] if index in self._cached else self.pixels(index)
        if self.cache:
            self._cached[index] = array
        image = from_uint8(torch.from_numpy(array).permute(2, 0, 1).contiguous())
        if self.flip and np.random.default_rng([self.seed, 3, epoch, index]).random() < 0.5:
            image = image.flip(-1)
        return {"image": image, "path": self.path(index)}


class FolderImages(ImageSet):
    """All images in a folder and its subfolders.

    Images are rotated according to EXIF and converted to 8-bit RGB; transparent pixels are composited over white. Only
    the first frame of an animation is used. The constructor reads all headers, so that files that are not images are
    reported before training starts. If the pixels of an image turn out to be damaged later, an error names the image.

    Args:
        root: the folder.
        size: height and width. None: the images' common size, which must be a power of two.
        fit: how to fit images of another shape: `squash` (scale both sides to `size`), `pad` (scale to fit, fill the
            rest from the nearest edge) or `crop` (scale to cover, keep the centre). None: raise an error.
        limit: use only the first `limit` images.

    Raises:
        UserError: if there are no images, a file is not an image or has floating-point pixels, sizes differ without
            `fit`, or the size is not a power of two.
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
            raise UserError("Set data.root=DIR, the folder with the training images, or use domain=toyfaces.")
        self.fit = None if fit is None else choice("fit", fit, FITS)
        self.files = list_images(root)[: whole("limit", limit, 1, optional=True)]
        size = None if size is None else _check_size(size)
        if fit is not None and size is None:
            raise UserError("data.fit needs a size. Set domain.size to a power of two, for example 64.")
        sizes = [_header_size(path) for path in self.files]
        if fit is None:
            size = self._common_size(sizes, size)
        assert size is not None
        super().__init__(size, **options)

    def _common_size(self, sizes: list[tuple[int, int]], wanted: int | None) -> int:
        """Return the common height and width of all files."""
        width, height = sizes[0]
        first = f"{self.files[0]} has {width}x{height} pixels"
        nearest = _nearest_power(width)
        if width != height:
            problem = f"{first}, which is not square"
        elif wanted not in (None, width):
            problem = f"{first}, but domain.size={wanted}"
        elif width != nearest:
            problem = f"{first}, but a network's size is a power of two, at least 8"
        elif other := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
            problem = f"{self.files[other]} has {sizes[other][0]}x{sizes[other][1]} pixels, but {first}"
        else:
            return width
        raise UserError(
            f"{problem}. To fit the images, set data.fit=squash, pad or crop and a power of two as size, for example "
            f"domain.size={nearest}."
        )

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return str(self.files[index])

    def pixels(self, index: int) -> np.ndarray:
        return np.array(fit_image(open_8bit(self.files[index], "RGB"), self.size, self.fit or "squash"))


def _header_size(path: Path) -> tuple[int, int]:
    """Return the width and height from the header, after the rotation that EXIF asks for."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.mode == "F":
                raise ValueError("floating-point pixels have no defined range")
            # without this check `getexif` decodes the whole file
            has_exif = "exif" in image.info or image.format == "TIFF"
            rotated = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as an image ({reason}). Remove it or replace it.") from None
    return (height, width) if rotated else (width, height)


def fit_image(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Return an RGB image of `size` x `size` pixels. `FolderImages` describes `fit`."""
    image = to_8bit(image, "RGB")
    width, height = image.size
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
    """Drawn faces, see `ToyFaces`.

    Args:
        n: number of faces.
        toy_seed: determines the faces.
        limit: use only the first `limit` faces.
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

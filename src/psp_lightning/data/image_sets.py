"""Plain images for generator training: files or drawings, one size, uint8 in memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from psp_lightning.data.pairing import list_images
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.data.transforms import open_image, to_8bit
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.images import from_uint8

FITS = ("squash", "pad", "crop")


class ImageSet(Dataset[dict[str, Any]], ABC):
    """Images of one size. Items, by (epoch, index): `image` float32 (3, size, size) in [-1, 1], `path`.

    Args:
        size: height and width.
        flip: mirror with probability 0.5, by (seed, epoch, index).
        seed: of the flips.
        cache: keep every decoded image in memory, as uint8.
    """

    def __init__(self, size: int, flip: bool = False, seed: int = 0, cache: bool = False) -> None:
        if size < 8 or size & (size - 1):
            near = 1 << max(3, round(np.log2(max(size, 1))))
            raise UserError(f"domain.size={size} must be a power of two from 8, for example {near}.")
        self.size, self.flip, self.seed = size, flip, seed
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """uint8 (size, size, 3)."""

    @abstractmethod
    def path(self, index: int) -> str:
        """What the image is called in messages."""

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
        fit: what becomes of images of another shape: `squash` (both sides scaled to `size`), `pad` (scaled to fit, the
            rest filled by the nearest edge), `crop` (scaled to cover, the centre is kept). None: they are an error.
        limit: use the first so many only.

    Grey images become RGB; transparent pixels are put on white.

    Raises:
        UserError: no images; files of several sizes and no `fit`; a size that is no power of two.
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
        if fit is not None and fit not in FITS:
            raise UserError(f"data.fit={fit} is unknown.{suggest(fit, FITS)} Choose from: {', '.join(FITS)}")
        self.files = list_images(root)[:limit]
        self.fit = fit
        if fit is None:
            size = self._common_size(size)
        elif size is None:
            raise UserError("data.fit needs the size to fit to: domain.size=64 (a power of two).")
        super().__init__(size, **options)

    def _common_size(self, size: int | None) -> int:
        """The one size of all files, from their headers."""
        for path in self.files:
            try:
                with Image.open(path) as image:
                    width, height = image.size
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(f"{path} cannot be read as an image ({error}); remove it or replace it.") from None
            size = width if size is None else size
            if (width, height) != (size, size):
                raise UserError(
                    f"{path} has {width}x{height} pixels, {self.files[0]} and domain.size ask for {size}x{size}. Say "
                    "how to fit: data.fit=squash, pad or crop, with domain.size=N, a power of two."
                )
        assert size is not None
        return size

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return str(self.files[index])

    def pixels(self, index: int) -> np.ndarray:
        return np.asarray(fit_image(open_image(self.files[index]), self.size, self.fit or "squash"))


def fit_image(image: Image.Image, size: int, fit: str) -> Image.Image:
    """RGB image of `size` x `size` pixels; see `FolderImages` for `fit`."""
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
        self.faces = ToyFaces(size, toy_seed, n if limit is None else min(n, limit))

    def __len__(self) -> int:
        return len(self.faces)

    def path(self, index: int) -> str:
        return f"toyfaces/seed{self.faces.seed}/{index:06d}"

    def pixels(self, index: int) -> np.ndarray:
        return self.faces.draw(index).image

"""The kinds of source images, one class each: their channels, and conversion of pictures to tensors and back."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.data import transforms
from psp_lightning.data.labels import LabelMap
from psp_lightning.data.masks import as_mask, draw_mask, transparent_hole
from psp_lightning.utils.images import from_uint8
from psp_lightning.utils.pictures import ImageLike, open_image

Hole = ImageLike | np.ndarray


@dataclass(frozen=True)
class Source(ABC):
    """Base class of the kinds. All constructor arguments are fields of `InputSpec`.

    Args:
        size: height and width of the tensor in pixels.
    """

    size: int

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of channels of the tensor."""

    @abstractmethod
    def load(
        self,
        picture: ImageLike,
        rng: np.random.Generator | None = None,
        factor: int | None = None,
        mask: Hole | None = None,
    ) -> Tensor:
        """Return a picture as the encoder's input, float32 (channels, size, size).

        Args:
            picture: path or PIL image.
            rng: source of random numbers for the factor of `LowRes` and the hole of `Masked`.
            factor: down-sampling factor of `LowRes`. Without `factor` and `rng` the picture is assumed to have low
                resolution already and is only resized.
            mask: hole of `Masked`, a file, image or array that `psp_lightning.data.masks.as_mask` reads. The default is
                the picture's transparent pixels if it has any, otherwise a hole drawn from `rng`, or a fixed hole.

        Raises:
            UserError: if the image cannot be read or contains a label id outside the map. The message names the file.
        """

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return a float32 batch (B, channels, H, W) as pictures (B, 3, H, W) in [-1, 1]."""
        return x[:, :3]

    def mirror(self, x: Tensor) -> Tensor:
        """Mirror (channels, H, W) left to right."""
        return x.flip(-1)


class RGB(Source):
    """3 channels in [-1, 1]."""

    channels = 3

    def load(self, picture: ImageLike, rng: Any = None, factor: Any = None, mask: Any = None) -> Tensor:
        return transforms.rgb(picture, self.size)


class Sketch(Source):
    """1 channel in [0, 1]; paper is 1, ink is 0."""

    channels = 1

    def load(self, picture: ImageLike, rng: Any = None, factor: Any = None, mask: Any = None) -> Tensor:
        return transforms.sketch(picture, self.size)

    def to_rgb(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1) * 2 - 1


@dataclass(frozen=True)
class Labels(Source):
    """One-hot, with one channel per class; pictures have the colours of the label map."""

    n_classes: int
    interpolation: str = "nearest"
    label_map: dict[str, Any] | None = None

    @property
    def channels(self) -> int:
        return self.n_classes

    @functools.cached_property
    def classes(self) -> LabelMap:
        return LabelMap.from_dict(self.label_map) if self.label_map else LabelMap.numbered(self.n_classes)

    def load(self, picture: ImageLike, rng: Any = None, factor: Any = None, mask: Any = None) -> Tensor:
        return transforms.labels(picture, self.size, self.classes, self.interpolation)

    def to_rgb(self, x: Tensor) -> Tensor:
        palette = torch.tensor(self.classes.colors)  # (n_classes, 3)
        return from_uint8(palette[x.argmax(dim=1)].permute(0, 3, 1, 2))

    def mirror(self, x: Tensor) -> Tensor:
        """Mirror left to right, swapping the classes of the person's left and right."""
        return x.flip(-1)[self.classes.mirrored_channels()]


@dataclass(frozen=True)
class LowRes(Source):
    """3 channels in [-1, 1], down-sampled and then resized to `size`."""

    factors: tuple[int, ...] = ()
    channels = 3

    def load(
        self, picture: ImageLike, rng: np.random.Generator | None = None, factor: int | None = None, mask: Any = None
    ) -> Tensor:
        if factor is None and rng is not None and self.factors:
            factor = int(rng.choice(self.factors))
        return transforms.rgb(picture, self.size) if factor is None else transforms.lowres(picture, self.size, factor)


@dataclass(frozen=True)
class Masked(Source):
    """3 channels in [-1, 1], 0 in the hole, and a fourth for the hole: 1 inside, 0 outside."""

    mask: dict[str, Any] = field(default_factory=dict)
    channels = 4

    def load(
        self, picture: ImageLike, rng: np.random.Generator | None = None, factor: Any = None, mask: Hole | None = None
    ) -> Tensor:
        image = open_image(picture)
        hole = transparent_hole(image, self.size) if mask is None else as_mask(mask, self.size)
        if hole is None:
            hole = draw_mask(self.size, rng or np.random.default_rng(0), **self.mask)
        return transforms.masked(transforms.rgb(image, self.size), hole)


SOURCES: dict[str, type[Source]] = {
    "rgb": RGB, "sketch": Sketch, "labels": Labels, "lowres": LowRes, "masked": Masked,
}  # fmt: skip

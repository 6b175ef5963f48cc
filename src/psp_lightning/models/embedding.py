"""A small face embedding for domains without a public one: identity, perceptual features, Frechet statistics.

Source: designed for this library; a residual network similar to He et al. (arXiv:1512.03385), with unit-length output
as in FaceNet (arXiv:1503.03832).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.models.registry import record_config, register_embedding
from psp_lightning.utils.errors import UserError


class _Stage(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


@register_embedding
class ToyFaceEmbedding(nn.Module):
    """A network from images to unit vectors; the dot product of two vectors measures how similar the identities are.

    Raises:
        UserError: `input_size` is not a power of two, or too small for the stages to halve it.
    """

    @record_config
    def __init__(
        self,
        input_size: int = 64,  # side of the images, a power of two; other images are resized
        widths: Sequence[int] = (32, 64, 96, 128),  # channels of the stages, each with half the previous resolution
        dim: int = 64,  # length of the vector
    ) -> None:
        super().__init__()
        if input_size < 1 << len(widths) or input_size & (input_size - 1):
            raise UserError(
                f"ToyFaceEmbedding input_size={input_size}: it must be a power of two, {1 << len(widths)} or more."
            )
        self.input_size = input_size
        self.stages = nn.ModuleList(_Stage(a, b) for a, b in zip((3, *widths), widths, strict=False))
        side = input_size >> len(widths)
        self.project = nn.Linear(widths[-1] * side * side, dim)

    def features(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) in [-1, 1] to the outputs of the stages, (B, widths[i], S / 2^(i+1), S / 2^(i+1))."""
        if image.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            larger = min(image.shape[-2:]) > self.input_size
            image = F.adaptive_avg_pool2d(image, size) if larger else F.interpolate(image, size, mode="bilinear")
        found = []
        for stage in self.stages:
            image = stage(image)
            found.append(image)
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to unit vectors (B, dim)."""
        return F.normalize(self.project(self.features(image)[-1].flatten(1)), dim=1)

    def statistics(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to (B, sum of widths): the spatial means of the stages, for Frechet distances."""
        return torch.cat([stage.mean((2, 3)) for stage in self.features(image)], 1)

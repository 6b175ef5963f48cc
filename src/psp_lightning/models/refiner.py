"""A network that adds to a feature map of the generator what the codes of an image cannot express.

Sources of the idea: Yao et al., Feature-Style Encoder (arXiv:2202.02183), and Wang et al., HFGI (arXiv:2109.06590). The
architecture is designed for this library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.models.registry import record_config, register_refiner
from psp_lightning.utils.errors import UserError

SLOPE = 0.2  # negative slope of the leaky ReLU, as in the generator


class _Residual(nn.Module):
    """A residual block: adds the result of two convolutions to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, SLOPE)), SLOPE))


@register_refiner
class FeatureRefiner(nn.Module):
    """A convolutional network that maps an image and its first reconstruction to a change of one feature map.

    The change is zero before training.

    Raises:
        UserError: a size is not a power of two, `resolution` is larger than `input_size`, or a count is below one.
    """

    config: dict[str, Any]

    @record_config
    def __init__(
        self,
        resolution: int,  # side of the feature map, a power of two from 4
        channels: int,  # channels of the feature map
        input_size: int,  # side of the image, a power of two
        width: int = 96,  # channels of the network at the map's resolution
        blocks: int = 4,  # residual blocks at the map's resolution
    ) -> None:
        super().__init__()
        for name, value in (("resolution", resolution), ("input_size", input_size)):
            if value < 4 or value & (value - 1):
                raise UserError(f"FeatureRefiner {name}={value}: it must be a power of two, 4 or more.")
        if resolution > input_size:
            raise UserError(f"FeatureRefiner resolution={resolution}: it must be at most input_size={input_size}.")
        for name, value in (("channels", channels), ("width", width), ("blocks", blocks)):
            if value < 1:
                raise UserError(f"FeatureRefiner {name}={value}: it must be 1 or more.")
        self.resolution, self.channels, self.input_size = resolution, channels, input_size
        halvings = (input_size // resolution).bit_length() - 1
        widths = [max(16, width >> (halvings - i)) for i in range(halvings)] + [width]
        self.stem = nn.Conv2d(9, widths[0], 3, 1, 1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.fuse = nn.Conv2d(width + channels, width, 1)
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.change = nn.Conv2d(width, channels, 3, 1, 1)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, first: Tensor, features: Tensor) -> Tensor:
        """Return what to add to the feature map, float (B, channels, resolution, resolution).

        Args:
            x: images (B, 3, input_size, input_size) in [-1, 1].
            first: their reconstructions from the codes, (B, 3, input_size, input_size).
            features: the generator's feature maps for these codes, (B, channels, resolution, resolution).
        """
        h = self.stem(torch.cat([x, first, x - first], 1))
        for layer in self.down:
            h = layer(F.leaky_relu(h, SLOPE))
        h = self.fuse(torch.cat([F.leaky_relu(h, SLOPE), features.to(h.dtype)], 1))
        return self.change(F.leaky_relu(self.blocks(h), SLOPE))

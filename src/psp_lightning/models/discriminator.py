"""The StyleGAN2 discriminator: the residual network that a generator is trained against.

Source: Karras et al., StyleGAN2 (arXiv:1912.04958), figure 7 (residual nets) and appendix B; minibatch standard
deviation from Karras et al., Progressive GAN (arXiv:1710.10196), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.models.layers import EqualisedLinear, FIRFilter, HalfPrecision
from psp_lightning.models.registry import record_config
from psp_lightning.ops import fused_leaky_relu, upfirdn2d
from psp_lightning.utils.errors import UserError


class EqualisedConv(nn.Module):
    """A convolution with an equalised learning rate and "same" padding."""

    fir: FIRFilter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,  # side of the kernel, odd
        down: bool = False,  # apply a FIR filter and halve the resolution
        activation: bool = True,  # add a bias, then apply a leaky ReLU
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activation else None
        self.scale = 1 / math.sqrt(in_channels * size * size)
        self.register_module("fir", FIRFilter(persistent=False) if down else None)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W), or half of H and W, multiplied by `gain`."""
        weight, size = self.weight * self.scale, self.weight.shape[-1]
        if self.fir is not None and size == 1:  # filtering first quarters the work of a 1x1 convolution
            x = F.conv2d(upfirdn2d(x, self.fir.taps, down=2, padding=(1, 1)), weight)
        elif self.fir is not None:
            x = upfirdn2d(x, self.fir.taps, padding=((size + 1) // 2, (size + 1) // 2))  # (B, C, H+1, W+1)
            x = F.conv2d(x, weight, stride=2)
        else:
            x = F.conv2d(x, weight, padding=size // 2)
        if self.bias is None:
            return x * gain
        return fused_leaky_relu(x, self.bias.to(x.dtype), scale=math.sqrt(2) * gain)


class ResidualBlock(nn.Module):
    """Two convolutions and a filtered shortcut, from one resolution to half of it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv(in_channels, in_channels, 3)
        self.conv2 = EqualisedConv(in_channels, out_channels, 3, down=True)
        self.skip = EqualisedConv(in_channels, out_channels, 1, down=True, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        half = math.sqrt(0.5)  # keeps the variance of the sum
        return self.conv2(self.conv1(x), half) + self.skip(x, half)


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Append a channel with the standard deviation of the features over a group of images, one value per group.

    Args:
        x: (B, C, H, W).
        group: images per group, reduced to the largest divisor of B that is not above it. Image i belongs to group
            `i % (B / group)`.

    Returns:
        (B, C + 1, H, W).

    Source: Progressive GAN (arXiv:1710.10196), section 3; groups as in StyleGAN2 (arXiv:1912.04958), appendix B.
    """
    b, _, h, w = x.shape
    group = next(n for n in range(min(group, b), 0, -1) if b % n == 0)
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (group, b // group))  # (G, M, C, H, W)
    deviation = (parts.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (M,)
    return torch.cat([x, deviation.to(x.dtype).repeat(group)[:, None, None, None].expand(b, 1, h, w)], 1)


class Discriminator(HalfPrecision):
    """StyleGAN2's residual discriminator: it maps an image to a score, which is higher for real images.

    A layer at resolution r has `min(max_channels, channel_base // r)` channels.

    Raises:
        UserError: the size is not a power of two from 8, or a count is below one.
    """

    config: dict[str, Any]

    @record_config
    def __init__(
        self,
        input_size: int,  # side of the image, a power of two from 8
        channel_base: int = 32768,
        max_channels: int = 512,
        image_channels: int = 3,
        group: int = 4,  # images per group of the minibatch standard deviation
    ) -> None:
        super().__init__()
        if input_size < 8 or input_size & (input_size - 1):
            raise UserError(f"Discriminator input_size={input_size}: it must be a power of two, 8 or more.")
        for name in ("channel_base", "max_channels", "image_channels", "group"):
            if self.config[name] < 1:
                raise UserError(f"Discriminator {name}={self.config[name]}: it must be 1 or more.")
        self.input_size, self.group = input_size, group

        def channels(resolution: int) -> int:
            return max(1, min(max_channels, channel_base // resolution))

        self.from_rgb = EqualisedConv(image_channels, channels(input_size), 1)
        self.resolutions = [input_size >> i for i in range(input_size.bit_length() - 3)]  # input_size, ..., 8
        self.blocks = nn.ModuleList(ResidualBlock(channels(r), channels(r // 2)) for r in self.resolutions)
        deep = channels(4)
        self.conv = EqualisedConv(deep + 1, deep, 3)
        self.hidden = EqualisedLinear(deep * 16, deep, activation=True)
        self.score = EqualisedLinear(deep, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, image_channels, input_size, input_size) in [-1, 1] to scores (B,).

        Raises:
            UserError: the image has another shape.
        """
        expected = (self.config["image_channels"], self.input_size, self.input_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise UserError(f"This discriminator takes images (B, {str(expected)[1:]}, got {tuple(image.shape)}.")
        x = image
        for resolution, block in zip(self.resolutions, self.blocks, strict=True):
            with self.precision(resolution, image.device):
                if resolution == self.input_size:
                    x = self.from_rgb(self.cast(x, resolution))  # (B, C, S, S)
                x = self.clamp(block(self.cast(x, resolution)), resolution)  # (B, C, r/2, r/2)
        x = minibatch_std(x.to(torch.promote_types(x.dtype, torch.float32)), self.group)  # (B, C + 1, 4, 4)
        x = self.conv(x).flatten(1)  # (B, C * 16)
        return self.score(self.hidden(x)).squeeze(1)


class LatentDiscriminator(nn.Module):
    """A discriminator of single styles: linear layers with leaky ReLUs between them.

    Source: Tov et al., e4e (arXiv:2102.02766), the latent discriminator; the sizes of its code, commit 99ea505.
    """

    def __init__(self, style_dim: int = 512, n_layers: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(n_layers - 1):
            layers += [nn.Linear(style_dim, style_dim), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(style_dim, 1))

    def forward(self, w: Tensor) -> Tensor:
        """Map styles (B, style_dim) to scores (B,)."""
        return self.layers(w).squeeze(1)

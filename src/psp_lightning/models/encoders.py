"""Encoders from an image to StyleGAN's W or W+ space.

Source: Richardson et al., pSp (arXiv:2008.00951), section 3 (gradual style encoder, map2style) and section 4.1 (the
baseline encoders into W and W+). Codes are checked against the reference, commit 5cfff38; the state dicts have the keys
of the released files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.models.irse import IRSEBody
from psp_lightning.models.layers import EqualisedLinear
from psp_lightning.models.registry import record_config, register_encoder
from psp_lightning.ops.cpu.strided_conv import strided_conv
from psp_lightning.utils.errors import UserError

IMAGE_CHANNELS = 3  # of the generator's image, an input of ReStyle encoders
COARSE, MIDDLE = 3, 7  # styles 0-2 come from the 1/16 map, 3-6 from the 1/8 map, the others from the 1/4 map


class IRSEEncoder(IRSEBody):
    """The base class of the encoders: shared arguments, the backbone, and the check of the input.

    Raises:
        UserError: an argument is out of range, or the input has another shape than the encoder was built for.
    """

    smallest_input = 16
    image_channels = 0  # channels of an image that the encoder receives in addition to the source
    iterations = 0  # see `models.protocols.RefiningEncoder`

    @record_config
    def __init__(
        self,
        style_dim: int = 512,  # length of a style
        in_channels: int = 3,  # channels of the source
        input_size: int = 256,  # side of the source, a power of two
        n_layers: int = 50,  # depth of the published backbones: 50, 100 or 152
        mode: str = "ir_se",  # residual units without ("ir") or with ("ir_se") squeeze and excitation
        blocks: Sequence[int] | None = None,  # residual units of the four stages, instead of n_layers
        width: int = 64,  # channels of the stem; the stages have 1, 2, 4 and 8 times as many
    ) -> None:
        name, smallest = type(self).__name__, self.smallest_input
        if input_size < smallest or input_size & (input_size - 1):
            sizes = ", ".join(str(smallest << i) for i in range(5))
            raise UserError(
                f"{name} input_size={input_size}: it must be a power of two ({sizes}, ...); published is 256."
            )
        for argument, value in (("style_dim", style_dim), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise UserError(f"{name} {argument}={value}: it must be 1 or more.")
        super().__init__(in_channels + self.image_channels, n_layers, mode, blocks, width)
        self.style_dim, self.in_channels, self.input_size = style_dim, in_channels, input_size

    def check_source(self, x: Tensor) -> None:
        """Raise a UserError unless x is (B, in_channels, input_size, input_size)."""
        name, side = type(self).__name__, self.input_size
        if x.ndim != 4:
            raise UserError(f"{name} takes a batch (B, {self.in_channels}, {side}, {side}), got {tuple(x.shape)}.")
        if x.shape[1] != self.in_channels:
            raise UserError(
                f"{name} was built for sources with {self.in_channels} channels, got {x.shape[1]}. "
                "Use the kind of source that it was trained for, or set in_channels."
            )
        if tuple(x.shape[2:]) != (side, side):
            raise UserError(
                f"{name} was built for {side}x{side} sources, got {x.shape[2]}x{x.shape[3]}. "
                f"Resize to {side}, or set input_size."
            )

    def check_styles(self, n_styles: int) -> int:
        """Return `n_styles`, or raise a UserError if it is less than one."""
        if n_styles < 1:
            raise UserError(
                f"{type(self).__name__} n_styles={n_styles}: it must be 1 or more (2 * log2(output size) - 2)."
            )
        return n_styles


class StridedConv(nn.Conv2d):
    """A 3x3 convolution with a stride of two, computed by `strided_conv`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return strided_conv(x, self.weight, self.bias)


class MapToStyle(nn.Module):
    """The head from a feature map to one style: strided convolutions down to 1x1, then a linear layer.

    Source: pSp (arXiv:2008.00951), figure 2, "map2style".
    """

    def __init__(self, in_channels: int, style_dim: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > 1:
            layers += [StridedConv(in_channels, style_dim), nn.LeakyReLU(0.01)]
            in_channels, side = style_dim, side // 2
        self.convs = nn.Sequential(*layers)
        self.linear = EqualisedLinear(style_dim, style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, side, side) to (B, style_dim)."""
        return self.linear(self.convs(x).flatten(1))


@register_encoder
class GradualStyleEncoder(IRSEEncoder):
    """The encoder of pSp: a feature pyramid over three stages, and one map2style head for each style.

    Args:
        n_styles: number of styles, `2 * log2(output_size) - 2` of the generator.
        *args, **kwargs: see `IRSEEncoder`; `input_size` is at least 32.
    """

    smallest_input = 32

    @record_config
    def __init__(self, n_styles: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_styles = self.check_styles(n_styles)
        _, fine, middle, deep = self.widths
        scales = [16 if i < COARSE else 8 if i < MIDDLE else 4 for i in range(n_styles)]
        self.styles = nn.ModuleList(MapToStyle(deep, self.style_dim, self.input_size // scale) for scale in scales)
        self.latlayer1 = nn.Conv2d(middle, deep, 1)
        self.latlayer2 = nn.Conv2d(fine, deep, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map a source to its codes.

        Args:
            x: (B, in_channels, input_size, input_size) float; RGB in [-1, 1], sketches and one-hot maps in [0, 1].

        Returns:
            (B, n_styles, style_dim), relative to the average latent.
        """
        return self.first_styles(x, self.n_styles)

    def first_styles(self, x: Tensor, n: int) -> Tensor:
        """Return the results of the first `n` heads, (B, n, style_dim), without computing the others."""
        self.check_source(x)
        _, c1, c2, c3 = self.features(x)  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16)
        maps = [c3] * COARSE
        if n > COARSE:
            p2 = _upsample_and_add(c3, self.latlayer1(c2))  # (B, 512, 32, 32)
            maps += [p2] * (MIDDLE - COARSE)
        if n > MIDDLE:
            p1 = _upsample_and_add(p2, self.latlayer2(c1))  # (B, 512, 64, 64)
            maps += [p1] * (n - MIDDLE)
        return torch.stack([self.styles[i](maps[i]) for i in range(n)], 1)


def _upsample_and_add(coarse: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True) + fine


class StagedEncoder(IRSEEncoder):
    """The base class of encoders that predict one style and differences from it, which can be trained in stages.

    Source: Tov et al., e4e (arXiv:2102.02766), section 4.
    """

    n_styles: int
    config: dict[str, Any]

    @property
    def differences(self) -> int:
        """The number of styles after the first that differ from it; the other styles are equal to the first.

        It can be set. `config` contains it, so a loaded checkpoint predicts the differences that have been trained.

        Raises:
            UserError: it is set to anything but a whole number from 0 to `n_styles - 1`, or None, which means all.
        """
        return int(self.config.get("differences", self.n_styles - 1))

    @differences.setter
    def differences(self, value: int | None) -> None:
        if value is not None and not (isinstance(value, int) and 0 <= value < self.n_styles):
            raise UserError(
                f"{type(self).__name__} differences={value}: it must be a whole number from 0 to {self.n_styles - 1}."
            )
        if value is None or value == self.n_styles - 1:
            self.config.pop("differences", None)  # as in files of version 0.1.0
        else:
            self.config["differences"] = value

    def add_to_first(self, styles: Tensor) -> Tensor:
        """Return codes (B, n_styles, style_dim).

        Args:
            styles: (B, 1 + differences, style_dim), the first style and what the following ones add to it.
        """
        first, n = styles[:, :1], styles.shape[1]
        parts = [first, first + styles[:, 1:]]
        if n < self.n_styles:
            parts.append(first.expand(-1, self.n_styles - n, -1))
        return torch.cat(parts, dim=1)


@register_encoder
class Encoder4Editing(StagedEncoder, GradualStyleEncoder):
    """The encoder of e4e: the first head gives a style for all layers, and the others add differences to it.

    Other arguments, layers and state dict are the same as in `GradualStyleEncoder`.

    Args:
        n_styles: number of styles, `2 * log2(output_size) - 2` of the generator.
        differences: how many styles after the first have a difference; None: all.
        *args, **kwargs: see `GradualStyleEncoder`.

    Source: Tov et al., e4e (arXiv:2102.02766), section 4.
    """

    @record_config
    def __init__(self, n_styles: int, *args: Any, differences: int | None = None, **kwargs: Any) -> None:
        super().__init__(n_styles, *args, **kwargs)
        self.differences = differences

    def forward(self, x: Tensor) -> Tensor:
        """Map a source to its codes, with the shapes of `GradualStyleEncoder`."""
        return self.add_to_first(self.first_styles(x, 1 + self.differences))


@register_encoder
class EncoderIntoW(IRSEEncoder):
    """An encoder that predicts one w for all layers from the average of the last feature map.

    Arguments are as for `IRSEEncoder`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear = EqualisedLinear(self.widths[3], self.style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, input_size, input_size) to (B, style_dim)."""
        self.check_source(x)
        x = self.body(self.input_layer(x))  # (B, 512, 16, 16)
        return self.linear(x.mean((2, 3)))  # (B, style_dim)


@register_encoder
class EncoderIntoWPlus(IRSEEncoder):
    """An encoder that predicts all styles from one vector: ArcFace's head pooled to 7x7, then a linear layer.

    Args:
        n_styles: number of styles, `2 * log2(output_size) - 2` of the generator.
        *args, **kwargs: see `IRSEEncoder`.
    """

    @record_config
    def __init__(self, n_styles: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_styles = self.check_styles(n_styles)
        deep = self.widths[3]
        self.output_layer_2 = nn.Sequential(
            nn.BatchNorm2d(deep), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(deep * 49, self.style_dim)
        )
        self.linear = EqualisedLinear(self.style_dim, self.style_dim * n_styles)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, input_size, input_size) to (B, n_styles, style_dim)."""
        self.check_source(x)
        x = self.body(self.input_layer(x))  # (B, 512, 16, 16)
        x = self.output_layer_2(x)  # (B, style_dim)
        return self.linear(x).unflatten(1, (self.n_styles, self.style_dim))


@register_encoder
class ReStyleEncoder(IRSEEncoder):
    """The encoder of ReStyle: all styles from the last feature map, refined by `PSP` in several passes.

    In the input of the first layer, the channels of the image follow the channels of the source.

    Args:
        n_styles: number of styles, `2 * log2(output_size) - 2` of the generator.
        iterations: number of passes, 1 to 100; the published networks use 5.
        *args, **kwargs: see `IRSEEncoder`; `input_size` is at least 32.

    Source: Alaluf et al., ReStyle (arXiv:2104.02699), section 3; its code, commit 5e80276, `BackboneEncoder`.
    """

    smallest_input = 32
    image_channels = IMAGE_CHANNELS

    @record_config
    def __init__(self, n_styles: int, *args: Any, iterations: int = 5, **kwargs: Any) -> None:
        if not isinstance(iterations, int) or not 1 <= iterations <= 100:
            raise UserError(f"ReStyleEncoder iterations={iterations}: it must be 1 to 100; published is 5.")
        super().__init__(*args, **kwargs)
        self.n_styles, self.iterations = self.check_styles(n_styles), iterations
        side = self.input_size // 16
        self.styles = nn.ModuleList(MapToStyle(self.widths[3], self.style_dim, side) for _ in range(n_styles))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Make one pass.

        Args:
            x: the source, (B, in_channels, input_size, input_size) float.
            image: the image of the codes so far, (B or 1, 3, H, W) in about [-1, 1]; it is pooled to the source's size.

        Returns:
            The update of these codes, (B, n_styles, style_dim).

        Raises:
            UserError: the source has another shape, or the image does not have three channels.
        """
        return self.first_updates(x, image, self.n_styles)

    def first_updates(self, x: Tensor, image: Tensor, n: int) -> Tensor:
        """Return the results of the first `n` heads, (B, n, style_dim), without computing the others."""
        self.check_source(x)
        if image.shape[1] != IMAGE_CHANNELS:
            raise UserError(f"ReStyle's encoder takes images of 3 channels, the generator makes {image.shape[1]}.")
        image = F.adaptive_avg_pool2d(image, self.input_size).expand(x.shape[0], -1, -1, -1)
        x = self.body(self.input_layer(torch.cat([x, image], dim=1)))  # (B, 512, 16, 16)
        return torch.stack([self.styles[i](x) for i in range(n)], 1)


@register_encoder
class ReStyleEncoder4Editing(StagedEncoder, ReStyleEncoder):
    """ReStyle over e4e: in every pass, the first head gives a style for all layers, and the others add differences.

    Args:
        n_styles: number of styles, `2 * log2(output_size) - 2` of the generator.
        differences: how many styles after the first have a difference; None: all.
        *args, **kwargs: see `ReStyleEncoder`.

    Source: `ProgressiveBackboneEncoder` of ReStyle's code, commit 5e80276.
    """

    @record_config
    def __init__(self, n_styles: int, *args: Any, differences: int | None = None, **kwargs: Any) -> None:
        super().__init__(n_styles, *args, **kwargs)
        self.differences = differences

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Make one pass, with the shapes of `ReStyleEncoder`."""
        return self.add_to_first(self.first_updates(x, image, 1 + self.differences))

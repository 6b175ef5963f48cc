"""Encoders from an image to StyleGAN's W or W+ space.

Source: Richardson et al., pSp (arXiv:2008.00951), section 3 (gradual style encoder, map2style) and section 4.1 (the
encoders into W and W+ that it is compared with). Codes are checked against the reference, commit 5cfff38; the state
dicts have the keys of the released files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from psp_lightning.models.irse import IRSEBody
from psp_lightning.models.layers import EqualisedLinear
from psp_lightning.models.registry import register_encoder
from psp_lightning.ops.cpu.strided_conv import product_pays, strided_conv, strided_convs
from psp_lightning.utils.errors import UserError

IMAGE_CHANNELS = 3  # of the generator's image, where an encoder looks at it
COARSE, MIDDLE = 3, 7  # styles 0-2 come from the 1/16 map, 3-6 from the 1/8 map, the others from the 1/4 map


class _Encoder(IRSEBody):
    """What the encoders share: the backbone, `config`, and the check of the input."""

    def __init__(
        self,
        style_dim: int,
        in_channels: int,
        input_size: int,
        n_layers: int,
        mode: str,
        blocks: Sequence[int] | None,
        width: int,
        more_channels: int = 0,
    ) -> None:
        for name, value in (("style_dim", style_dim), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise UserError(f"{type(self).__name__} {name}={value}: it must be 1 or more.")
        super().__init__(in_channels + more_channels, n_layers, mode, blocks, width)
        self.in_channels = in_channels  # of the source
        self.style_dim, self.input_size = style_dim, input_size
        self.config: dict[str, Any] = {
            "style_dim": style_dim,
            "in_channels": in_channels,
            "input_size": input_size,
            "n_layers": n_layers,
            "mode": mode,
            "blocks": None if blocks is None else [int(b) for b in blocks],
            "width": width,
        }

    def _check(self, x: Tensor) -> None:
        name, side = type(self).__name__, self.input_size
        if x.ndim != 4:
            raise UserError(f"{name} takes a batch (B, {self.in_channels}, {side}, {side}), got {tuple(x.shape)}.")
        if x.shape[1] != self.in_channels:
            raise UserError(
                f"{name} was built for sources of {self.in_channels} channels, got {x.shape[1]}. "
                "Give the kind of source that it was trained for, or set in_channels."
            )
        if tuple(x.shape[2:]) != (side, side):
            raise UserError(
                f"{name} was built for {side}x{side} sources, got {x.shape[2]}x{x.shape[3]}. "
                f"Resize to {side}, or set input_size."
            )


def _check_size(name: str, input_size: int, smallest: int) -> None:
    if input_size < smallest or input_size & (input_size - 1):
        sizes = ", ".join(str(smallest << i) for i in range(5))
        raise UserError(f"{name} input_size={input_size}: it must be a power of two ({sizes}, ...); published is 256.")


def _check_styles(name: str, n_styles: int) -> None:
    if n_styles < 1:
        raise UserError(f"{name} n_styles={n_styles}: it must be 1 or more (2 * log2(output size) - 2).")


class StridedConv(nn.Conv2d):
    """3x3 convolution with a stride of two; a type of its own because of `strided_conv`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return strided_conv(x, self.weight, self.bias)


class MapToStyle(nn.Module):
    """Feature map to one style: strided convolutions down to 1x1, then a linear layer.

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

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, in_channels, side, side) to (B, style_dim); `first` (B, style_dim, side / 2, side / 2), where it is
        known, is what the first convolution gives."""
        if first is None:
            return self.linear(self.convs(x).flatten(1))
        for layer in list(self.convs)[1:]:
            first = layer(first)
        return self.linear(first.flatten(1))


def styles(x: Tensor, heads: Sequence[nn.Module]) -> list[Tensor]:
    """What each of the heads gives for one map, (B, style_dim); where that is faster, their first convolutions are one
    call."""
    convs = [conv for conv in map(_first_convolution, heads) if conv is not None]
    pays = all(conv.bias is not None and product_pays(x, conv.weight, conv.bias) for conv in convs)
    if len(convs) < max(2, len(heads)) or not pays:
        return [head(x) for head in heads]
    found = strided_convs(x, [conv.weight for conv in convs], [conv.bias for conv in convs])  # type: ignore[misc]
    return [head(x, y) for head, y in zip(heads, found, strict=True)]


def _first_convolution(head: nn.Module) -> StridedConv | None:
    """That of a `MapToStyle`, unless somebody would notice that it is not called, or the head otherwise than before."""
    if type(head) is not MapToStyle or type(head.convs) is not nn.Sequential or not len(head.convs):
        return None
    first = head.convs[0]
    if type(first) is not StridedConv or _has_any_global_hook():
        return None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for part in (head, head.convs, first):
        if "forward" in part.__dict__ or any(getattr(part, name) for name in hooks):
            return None
    return first


@register_encoder
class GradualStyleEncoder(_Encoder):
    """pSp's encoder: a feature pyramid over three stages, one map2style head for each style.

    Args:
        n_styles: styles to give, `2 * log2(output_size) - 2` of the generator.
        style_dim: length of a style.
        in_channels: channels of the source.
        input_size: side of the source, a power of two from 32.
        n_layers, mode, blocks, width: the backbone, see `IRSEBody`.

    Raises:
        UserError: for a size or a backbone that cannot be built.
    """

    def __init__(
        self,
        n_styles: int,
        style_dim: int = 512,
        in_channels: int = 3,
        input_size: int = 256,
        n_layers: int = 50,
        mode: str = "ir_se",
        blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        _check_size("GradualStyleEncoder", input_size, 32)
        _check_styles("GradualStyleEncoder", n_styles)
        super().__init__(style_dim, in_channels, input_size, n_layers, mode, blocks, width)
        self.config = {"n_styles": n_styles, **self.config}
        self.n_styles = n_styles
        deep = self.widths[3]
        sides = [input_size // (16 if i < COARSE else 8 if i < MIDDLE else 4) for i in range(n_styles)]
        self.styles = nn.ModuleList(MapToStyle(deep, style_dim, side) for side in sides)
        self.latlayer1 = nn.Conv2d(self.widths[2], deep, 1)
        self.latlayer2 = nn.Conv2d(self.widths[1], deep, 1)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, in_channels, input_size, input_size) float; RGB in [-1, 1], sketches and one-hot maps in [0, 1].

        Returns:
            (B, n_styles, style_dim), relative to the average latent.

        Raises:
            UserError: when the input has another shape.
        """
        self._check(x)
        _, c1, c2, c3 = self.features(x)  # (B, 128, 64, 64), (B, 256, 32, 32), (B, 512, 16, 16)
        p2 = self._add(c3, self.latlayer1(c2))  # (B, 512, 32, 32)
        p1 = self._add(p2, self.latlayer2(c1))  # (B, 512, 64, 64)
        heads = list(self.styles)
        codes = styles(c3, heads[:COARSE]) + styles(p2, heads[COARSE:MIDDLE]) + styles(p1, heads[MIDDLE:])
        return torch.stack(codes, 1)

    @staticmethod
    def _add(coarse: Tensor, fine: Tensor) -> Tensor:
        return F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=True) + fine


@register_encoder
class Encoder4Editing(GradualStyleEncoder):
    """e4e's encoder: the first head gives one style for all, the others add their differences to it.

    Layers, arguments and state dict are those of `GradualStyleEncoder`.

    Source: Tov et al., e4e (arXiv:2102.02766), section 4, in its last stage of training, where every style has its
    difference.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As of `GradualStyleEncoder`."""
        return _add_to_first(super().forward(x))


def _add_to_first(codes: Tensor) -> Tensor:
    """(B, n_styles, style_dim): the first style, and the others with it added."""
    return torch.cat([codes[:, :1], codes[:, :1] + codes[:, 1:]], dim=1)


@register_encoder
class EncoderIntoW(_Encoder):
    """One w for the whole image, from the average of the last feature map.

    Arguments as of `GradualStyleEncoder`; `input_size` from 16.
    """

    def __init__(
        self,
        style_dim: int = 512,
        in_channels: int = 3,
        input_size: int = 256,
        n_layers: int = 50,
        mode: str = "ir_se",
        blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        _check_size("EncoderIntoW", input_size, 16)
        super().__init__(style_dim, in_channels, input_size, n_layers, mode, blocks, width)
        self.linear = EqualisedLinear(self.widths[3], style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, input_size, input_size) to (B, style_dim); errors as of `GradualStyleEncoder`."""
        self._check(x)
        x = self.body(self.input_layer(x))  # (B, 512, 16, 16)
        return self.linear(x.mean((2, 3)))  # (B, style_dim)


@register_encoder
class EncoderIntoWPlus(_Encoder):
    """All styles from one vector: ArcFace's head pooled to 7x7, then a linear layer.

    Arguments as of `GradualStyleEncoder`; `input_size` from 16.
    """

    def __init__(
        self,
        n_styles: int,
        style_dim: int = 512,
        in_channels: int = 3,
        input_size: int = 256,
        n_layers: int = 50,
        mode: str = "ir_se",
        blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        _check_size("EncoderIntoWPlus", input_size, 16)
        _check_styles("EncoderIntoWPlus", n_styles)
        super().__init__(style_dim, in_channels, input_size, n_layers, mode, blocks, width)
        self.config = {"n_styles": n_styles, **self.config}
        self.n_styles = n_styles
        deep = self.widths[3]
        self.output_layer_2 = nn.Sequential(
            nn.BatchNorm2d(deep), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(deep * 49, style_dim)
        )
        self.linear = EqualisedLinear(style_dim, style_dim * n_styles)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, input_size, input_size) to (B, n_styles, style_dim); errors as of `GradualStyleEncoder`."""
        self._check(x)
        x = self.body(self.input_layer(x))  # (B, 512, 16, 16)
        x = self.output_layer_2(x)  # (B, style_dim)
        return self.linear(x).unflatten(1, (self.n_styles, self.style_dim))


@register_encoder
class ReStyleEncoder(_Encoder):
    """ReStyle's encoder: all styles from the last feature map, refined in several passes.

    A pass sees the source and the image of the codes so far, and gives what is added to them; `PSP` makes the passes.

    Args:
        iterations: passes, 1 to 100; published are 5.
        in_channels: of the source; the first layer takes the image's three after them.

    Other arguments as of `GradualStyleEncoder`; `input_size` from 32.

    Source: Alaluf et al., ReStyle (arXiv:2104.02699), section 3; its code, commit 5e80276, `BackboneEncoder`.
    """

    def __init__(
        self,
        n_styles: int,
        style_dim: int = 512,
        in_channels: int = 3,
        input_size: int = 256,
        iterations: int = 5,
        n_layers: int = 50,
        mode: str = "ir_se",
        blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        _check_size("ReStyleEncoder", input_size, 32)
        _check_styles("ReStyleEncoder", n_styles)
        if not isinstance(iterations, int) or not 1 <= iterations <= 100:
            raise UserError(f"ReStyleEncoder iterations={iterations}: it must be 1 to 100; published is 5.")
        super().__init__(style_dim, in_channels, input_size, n_layers, mode, blocks, width, IMAGE_CHANNELS)
        self.config = {"n_styles": n_styles, "iterations": iterations, **self.config}
        self.n_styles, self.iterations = n_styles, iterations
        self.styles = nn.ModuleList(MapToStyle(self.widths[3], style_dim, input_size // 16) for _ in range(n_styles))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """One pass.

        Args:
            x: the source, (B, in_channels, input_size, input_size) float.
            image: of the codes so far, (B or 1, 3, H, W) in about [-1, 1]; it is pooled to the source's size.

        Returns:
            (B, n_styles, style_dim), to be added to these codes.

        Raises:
            UserError: when the source has another shape, or the image is not of three channels.
        """
        self._check(x)
        if image.shape[1] != IMAGE_CHANNELS:
            raise UserError(f"ReStyle's encoder looks at images of 3 channels, the generator makes {image.shape[1]}.")
        image = F.adaptive_avg_pool2d(image, self.input_size).expand(x.shape[0], -1, -1, -1)
        x = self.body(self.input_layer(torch.cat([x, image], dim=1)))  # (B, 512, 16, 16)
        return torch.stack(styles(x, list(self.styles)), 1)


@register_encoder
class ReStyleEncoder4Editing(ReStyleEncoder):
    """`ReStyleEncoder` over e4e: in every pass the other heads' styles are differences from the first's.

    Source: `ProgressiveBackboneEncoder` of ReStyle's code, in its last stage of training.
    """

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """As of `ReStyleEncoder`."""
        return _add_to_first(super().forward(x, image))

"""The StyleGAN2 generator: mapping network and synthesis network.

Source: Karras et al., StyleGAN2 (arXiv:1912.04958), figure 2 (synthesis) and section 3 (skip connections). The state
dict has the published PyTorch layout (`style.*`, `conv1.*`, `convs.*`, `to_rgbs.*`, `noises.*`), which determines
several attribute names. Images, codes and truncation are checked against the pSp reference, commit 5cfff38.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from psp_lightning.models.layers import EqualisedLinear, FIRFilter, HalfPrecision
from psp_lightning.models.registry import record_config, register_generator
from psp_lightning.ops import modconv_epilogue, modulated_convolution, upfirdn2d
from psp_lightning.utils.errors import UserError

Noise: TypeAlias = Literal["const", "random"] | Sequence[Tensor]
# Receives the resolution r and the feature map (B, C, r, r) at the end of its block; returns the map to use instead
FeatureEdit: TypeAlias = Callable[[int, Tensor], Tensor]
FIR_PADDING = (1, 1)  # of the four-tap filter: an upsampling 3x3 convolution then exactly doubles its input


class PixelNorm(nn.Module):
    """Scaling of each row to unit mean square."""

    def forward(self, z: Tensor) -> Tensor:
        return z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class ModulatedConv(nn.Module):
    """A convolution whose input channels are scaled by a style w, and whose output channels are demodulated."""

    blur: FIRFilter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,  # side of the kernel, odd
        style_dim: int,  # length of w
        demodulate: bool = True,
        up: bool = False,  # double the resolution
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size * size)
        self.modulation = EqualisedLinear(style_dim, in_channels, bias_init=1)
        self.demodulate = demodulate
        self.register_module("blur", FIRFilter(gain=4) if up else None)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the convolution and its demodulation factors; `modconv_epilogue` applies them and the FIR filter."""
        up = self.blur is not None
        return modulated_convolution(x, self.weight * self.scale, self.modulation(w), self.demodulate, up)

    # The weight has a leading axis of one in the published layout. The axis exists only in state dicts, because
    # `module.to(memory_format=torch.channels_last)` would fail for a parameter with five dimensions.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].unsqueeze(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if given is not None and given.ndim == 5 and given.shape[0] == 1:
            state_dict[prefix + "weight"] = given[0]
        super()._load_from_state_dict(state_dict, prefix, *args)


class StyledConv(nn.Module):
    """A modulated convolution, followed by noise, bias and leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, style_dim, up=up)
        self.noise = nn.ParameterDict({"weight": torch.zeros(1)})  # strength of the noise
        self.activate = nn.ParameterDict({"bias": torch.zeros(out_channels)})

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, clamp: float | None = None) -> Tensor:
        """Map x (B, C, H, W) and w (B, style_dim) to (B, C', H, W), or to twice H and W.

        `noise` is (1 or B, 1, H', W'); None draws it from the global random state. `clamp` bounds absolute values.
        """
        batch, _, height, width = x.shape
        fir, up = (None, 1) if self.conv.blur is None else (self.conv.blur.taps, 2)
        x, demod = self.conv(x, w)
        if noise is None:
            noise = x.new_empty(batch, 1, height * up, width * up).normal_()
        strength, bias = self.noise["weight"], self.activate["bias"]
        return modconv_epilogue(x, fir, FIR_PADDING, demod, noise, strength, bias, clamp=clamp)


class ToRGB(nn.Module):
    """A 1x1 modulated convolution to image channels, added to the upsampled image so far."""

    def __init__(self, in_channels: int, image_channels: int, style_dim: int, up: bool = True) -> None:
        super().__init__()
        self.upsample = FIRFilter(gain=4) if up else None
        self.conv = ModulatedConv(in_channels, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None = None) -> Tensor:
        x, _ = self.conv(x, w)
        rgb = (x + self.bias).to(self.bias.dtype)  # the image is summed in full precision
        if image is None or self.upsample is None:
            return rgb
        return rgb + upfirdn2d(image, self.upsample.taps, up=2, padding=(2, 1))


@register_generator
class Generator(HalfPrecision):
    """The StyleGAN2 generator: z -> w -> image.

    A layer at resolution r has `min(max_channels, channel_base * channel_multiplier // r)` channels.

    Raises:
        UserError: the size is not a power of two from 8, a count is below one, or `channels` has the wrong length.
    """

    config: dict[str, Any]

    @record_config
    def __init__(
        self,
        output_size: int,  # side of the image, a power of two from 8
        style_dim: int = 512,  # length of w
        n_mapping: int = 8,  # layers of the mapping network
        channel_multiplier: int = 2,
        max_channels: int = 512,
        image_channels: int = 3,
        z_dim: int | None = None,  # length of z; None: style_dim
        channel_base: int = 16384,  # as in the published networks
        channels: Sequence[int] | None = None,  # at 4, 8, ..., output_size; None: the rule above
    ) -> None:
        super().__init__()
        if output_size < 8 or output_size & (output_size - 1):
            raise UserError(f"Generator output_size={output_size}: it must be a power of two, 8 or more.")
        z_dim = style_dim if z_dim is None else z_dim
        if type(self) is Generator:  # a derived class has its own arguments in config
            self.config["z_dim"] = z_dim
            if channels is None:
                del self.config["channels"]
        counts = {
            "style_dim": style_dim, "n_mapping": n_mapping, "channel_multiplier": channel_multiplier, "z_dim": z_dim,
            "max_channels": max_channels, "image_channels": image_channels, "channel_base": channel_base,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"Generator {name}={value}: it must be 1 or more.")
        self.output_size, self.style_dim, self.z_dim = output_size, style_dim, z_dim
        log_size = output_size.bit_length() - 1
        if channels is not None and (len(channels) != log_size - 1 or min(channels) < 1):
            raise UserError(f"Generator channels={list(channels)}: give {log_size - 1} counts, one per resolution.")
        self.n_styles, self.n_noises = 2 * log_size - 2, 2 * log_size - 3

        lengths = [z_dim] + [style_dim] * n_mapping
        layers = [EqualisedLinear(n, m, 0, lr_multiplier=0.01, activation=True) for n, m in itertools.pairwise(lengths)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        rule = [channel_base * channel_multiplier // 2**i for i in range(2, log_size + 1)]
        widths = [max(1, min(max_channels, width)) for width in rule] if channels is None else list(map(int, channels))
        self.feature_channels = {4 << i: width for i, width in enumerate(widths)}  # by resolution
        self.input = nn.ParameterDict({"input": torch.randn(1, widths[0], 4, 4)})
        self.conv1 = StyledConv(widths[0], widths[0], style_dim)
        self.to_rgb1 = ToRGB(widths[0], image_channels, style_dim, up=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for wider, width in itertools.pairwise(widths):
            self.convs.append(StyledConv(wider, width, style_dim, up=True))
            self.convs.append(StyledConv(width, width, style_dim))
            self.to_rgbs.append(ToRGB(width, image_channels, style_dim))
        self.noises = nn.Module()
        for i, side in enumerate(self.noise_sides()):
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, side, side))

    def noise_sides(self) -> list[int]:
        """Return the sides of the noise maps: 4, 8, 8, 16, 16, ..."""
        return [2 ** ((i + 5) // 2) for i in range(self.n_noises)]

    @classmethod
    def seeded(cls, seed: int, **config: Any) -> Generator:
        """Return an untrained generator with weights drawn from `seed`; the global random state is unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(**config)

    def mapping(self, z: Tensor) -> Tensor:
        """Map z (B, z_dim), standard normal, to w (B, style_dim).

        Raises:
            UserError: z has another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise UserError(f"The mapping network takes z of shape (B, {self.z_dim}), got {tuple(z.shape)}.")
        return self.style(z)

    @staticmethod
    def truncate(w: Tensor, latent: Tensor, psi: float) -> Tensor:
        """Move w (..., style_dim) towards `latent` (broadcastable): `latent + psi * (w - latent)`.

        Source: StyleGAN (arXiv:1812.04948), appendix B.
        """
        return latent + psi * (w - latent)

    @torch.no_grad()
    def latent_average(self, n: int = 100_000, seed: int = 0) -> Tensor:
        """Return the mean w (style_dim,) of `n` draws of z; the global random state is unchanged."""
        source, total = torch.Generator().manual_seed(seed), torch.zeros(self.style_dim, dtype=torch.float64)
        reference = self.input["input"]
        for start in range(0, n, 10_000):
            z = torch.randn(min(10_000, n - start), self.z_dim, generator=source)
            total += self.mapping(z.to(reference)).sum(0).cpu().double()
        return (total / n).to(reference)

    def _noise_list(self, noise: Noise) -> Sequence[Tensor | None]:
        if isinstance(noise, str):
            if noise == "random":
                return [None] * self.n_noises
            if noise == "const":
                return [getattr(self.noises, f"noise_{i}") for i in range(self.n_noises)]
            raise UserError(f"noise={noise!r}: choose 'const', 'random' or a list of {self.n_noises} tensors.")
        sides = self.noise_sides()
        if len(noise) != len(sides):
            raise UserError(f"noise: this generator takes {len(sides)} noise maps, got {len(noise)}.")
        for i, (given, side) in enumerate(zip(noise, sides, strict=True)):
            if tuple(given.shape[1:]) != (1, side, side):
                raise UserError(f"noise[{i}]: expected (1 or B, 1, {side}, {side}), got {tuple(given.shape)}.")
        return noise

    def synthesis(self, w_plus: Tensor, noise: Noise = "const", features: FeatureEdit | None = None) -> Tensor:
        """Map W+ codes to images.

        Args:
            w_plus: (B, n_styles, style_dim), or (B, style_dim) for the same w in every layer.
            noise: "const" for the stored maps, "random" for new ones (drawn layer by layer from the global random
                state), or `n_noises` maps (1 or B, 1, r, r) with r = 4, 8, 8, 16, 16, ...
            features: reads or replaces feature maps: called as `features(r, map)` for r = 4, 8, ..., output_size after
                the last convolution of the resolution. The map (B, channels, r, r) that it returns goes to the next
                block and to the image.

        Returns:
            (B, image_channels, output_size, output_size) float, about [-1, 1], not clamped.

        Raises:
            UserError: a shape is wrong.
        """
        if w_plus.ndim == 2:
            w_plus = w_plus.unsqueeze(1).expand(-1, self.n_styles, -1)
        if w_plus.ndim != 3 or tuple(w_plus.shape[1:]) != (self.n_styles, self.style_dim):
            raise UserError(
                f"This {self.output_size} px generator takes codes (B, {self.n_styles}, {self.style_dim}), "
                f"got {tuple(w_plus.shape)}."
            )
        maps, styles = self._noise_list(noise), w_plus.unbind(1)
        x = self.input["input"].expand(w_plus.shape[0], -1, -1, -1)  # (B, 512, 4, 4)
        x = self.conv1(x, styles[0], maps[0])  # (B, 512, 4, 4)
        if features is not None:
            x = features(4, x)
        image = self.to_rgb1(x, styles[1])  # (B, 3, 4, 4)
        for i, to_rgb in enumerate(self.to_rgbs):
            first = 2 * i + 1  # ToRGB shares its style with the first convolution of the next block
            resolution = 8 << i
            with self.precision(resolution, x.device):
                x, bound = self.cast(x, resolution), self.bound(resolution)
                x = self.convs[2 * i](x, styles[first], maps[first], bound)  # (B, C, 2H, 2W)
                x = self.convs[2 * i + 1](x, styles[first + 1], maps[first + 1], bound)
                if features is not None:
                    x = features(resolution, x)
                image = to_rgb(x, styles[first + 2], image)  # (B, 3, 2H, 2W)
        return image

    def forward(self, z: Tensor, psi: float = 1.0, latent: Tensor | None = None, noise: Noise = "const") -> Tensor:
        """Map z (B, z_dim) to images, truncated by `psi` towards `latent` (default: `latent_average()`)."""
        w = self.mapping(z)
        if psi != 1:
            w = self.truncate(w, self.latent_average() if latent is None else latent, psi)
        return self.synthesis(w, noise)

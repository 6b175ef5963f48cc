"""StyleGAN2 generator: mapping network and synthesis network.

Source: Karras et al., StyleGAN2 (arXiv:1912.04958), figure 2 (synthesis) and section 3 (skip connections); the state
dict has the published PyTorch layout (`style.*`, `conv1.*`, `convs.*`, `to_rgbs.*`, `noises.*`). Images, codes and
truncation are checked against the pSp reference, commit 5cfff38.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from psp_lightning.models.half import HalfPrecision
from psp_lightning.models.layers import EqualisedLinear
from psp_lightning.models.registry import register_generator
from psp_lightning.ops import blur_padding, fir_kernel, modconv_epilogue, modulated_convolution, upfirdn2d
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv, frozen_to_rgb
from psp_lightning.ops.cpu.winograd import winograd_pays, winograd_weight
from psp_lightning.ops.dispatch import is_captured, use_op
from psp_lightning.utils.errors import UserError

Noise: TypeAlias = Literal["const", "random"] | Sequence[Tensor]
ValueT = TypeVar("ValueT")


class PixelNorm(nn.Module):
    """Scales each row to unit mean square."""

    def forward(self, z: Tensor) -> Tensor:
        return z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class FIRFilter(nn.Module):
    """Holder of a low-pass filter, so that it moves and is saved with the network."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.register_buffer("kernel", fir_kernel(gain=gain))
        self.kernel: Tensor


def is_constant(layer: nn.Module) -> bool:
    """Whether this call needs no gradient of the layer's parameters: in eval mode, and frozen or under no_grad.

    Not while a graph is captured, which is to hold the weights and not what was computed of them, nor under torch.func,
    whose tensors must not be kept.
    """
    if layer.training or is_captured():
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()))


def on_cpu(x: Tensor) -> bool:
    """Whether plain PyTorch on the CPU computes with x, and not an operator of ours or a mode of PyTorch's."""
    return x.device.type == "cpu" and type(x) is Tensor and not use_op(x)


def active_dtype(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes: that of autocast, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ModulatedConv(nn.Module):
    """Weights and style affine of one modulated convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int, style_dim: int, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size * size)
        self.modulation = EqualisedLinear(style_dim, in_channels, bias_init=1)
        self.demodulate = demodulate
        self.blur = FIRFilter(gain=4) if up else None

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution and its demodulation factors, which `modconv_epilogue` applies, as it does the low-pass
        filter where there is one."""
        up = self.blur is not None
        if not is_constant(self):
            return modulated_convolution(x, self.weight * self.scale, self.modulation(w), self.demodulate, up)
        weight, energy = self.constants(active_dtype(x))
        weight = weight.transpose(0, 1) if up else weight
        return modulated_convolution(x, weight, self.style(w), self.demodulate, up, energy)

    def style(self, w: Tensor) -> Tensor:
        """The scale of each input channel (B, in_channels) with the equalised learning rate in it, which is cheaper
        than to scale the weights."""
        with torch.autocast(w.device.type, enabled=False):
            style = self.modulation(w.to(self.modulation.weight.dtype)) * self.scale
        return style.to(torch.promote_types(style.dtype, torch.float32))

    def constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `frozen_styled_conv` takes as weight, in `dtype`, and as energy."""

        def compute() -> tuple[Tensor, Tensor]:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            energy = self.weight.to(wide).square().sum((2, 3))  # (O, I)
            cast = self.weight.to(dtype)
            return cast.transpose(0, 1).contiguous() if self.blur is not None else cast, energy

        return self._once("constants", dtype, compute)

    def fast(self, x: Tensor) -> Tensor | None:
        """What `frozen_styled_conv` takes as `fast` for x, where that pays."""
        if self.blur is not None or self.weight.is_inference() or not winograd_pays(x, self.weight):
            return None
        return self._once("fast", x.dtype, lambda: winograd_weight(self.weight))

    def _once(self, name: str, dtype: torch.dtype, compute: Callable[[], ValueT]) -> ValueT:
        """What was computed of the weight, until it is another one: loaded, moved, cast or changed in place.

        Not every change counts as one in PyTorch: those of `.data` do not, nor those of fused optimizers. On the CPU a
        sum over the weights of the first input channel tells of those that touch it; on a GPU it would have to be
        waited for.
        """
        weight = self.weight
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            some = float(weight[:, 0].double().sum()) if weight.device.type == "cpu" else None
            key = (weight.data_ptr(), weight.device, weight.dtype, dtype, some)
            version = None if weight.is_inference() else weight._version
            kept = self.__dict__.get("_kept", {})
            if version is not None and name in kept and kept[name][:2] == (key, version):
                known: ValueT = kept[name][2]
                return known
            value = compute()
            kept = {**kept, name: (key, version, value)}  # not changed in place: copies of the module share it
            self.__dict__["_kept"] = kept
            return value

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    # The published layout has a leading axis of one on the weight, here only in state dicts: a five-dimensional
    # parameter would make `module.to(memory_format=torch.channels_last)` fail.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].unsqueeze(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if given is not None and given.ndim == 5 and given.shape[0] == 1:
            state_dict[prefix + "weight"] = given[0]
        super()._load_from_state_dict(state_dict, prefix, *args)


class NoiseStrength(nn.Module):
    """Learned strength of one layer's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class ActivationBias(nn.Module):
    """Bias of one layer's activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, style_dim, up=up)
        self.noise = NoiseStrength()
        self.activate = ActivationBias(out_channels)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, clamp: float | None = None) -> Tensor:
        """`noise` (1|B, 1, H, W); None draws it from the global random state. `clamp` bounds the result."""
        scale = 1 if self.conv.blur is None else 2
        size = (x.shape[0], 1, x.shape[2] * scale, x.shape[3] * scale)
        blur, padding = None, (0, 0)
        if self.conv.blur is not None:
            blur = self.conv.blur.kernel
            padding = blur_padding(blur, self.conv.weight.shape[-1])
        if clamp is None and (noise is None or not noise.requires_grad) and is_constant(self) and on_cpu(x):
            x = x.to(active_dtype(x))
            if noise is None:
                noise = x.new_empty(size).normal_()
            weight, energy = self.conv.constants(x.dtype)
            noise = self.noise.weight * noise
            constant = (weight, energy, noise, self.activate.bias, blur, padding)
            return frozen_styled_conv(x, self.conv.style(w), *constant, fast=self.conv.fast(x))
        x, factor = self.conv(x, w)
        if noise is None:
            noise = x.new_empty(size).normal_()
        return modconv_epilogue(x, blur, padding, factor, noise, self.noise.weight, self.activate.bias, clamp=clamp)


class ToRGB(nn.Module):
    """1x1 modulated convolution to image channels, added to the up-sampled image so far."""

    def __init__(self, in_channels: int, image_channels: int, style_dim: int, up: bool = True) -> None:
        super().__init__()
        self.upsample = FIRFilter(gain=4) if up else None
        self.conv = ModulatedConv(in_channels, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))

    def forward(self, x: Tensor, w: Tensor, image: Tensor | None = None) -> Tensor:
        if is_constant(self) and on_cpu(x):
            x = frozen_to_rgb(x.to(active_dtype(x)), self.conv.style(w), self.conv.weight)
        else:
            x, _ = self.conv(x, w)
        rgb = (x + self.bias).to(self.bias.dtype)  # the image adds up in full precision
        if image is None or self.upsample is None:
            return rgb
        return rgb + upfirdn2d(image, self.upsample.kernel, up=2, padding=(2, 1))


class ConstantInput(nn.Module):
    """Learned 4x4 start of the synthesis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


@register_generator
class Generator(HalfPrecision):
    """StyleGAN2: z -> w -> image.

    Args:
        output_size: side of the image, a power of two from 8.
        style_dim: length of w.
        n_mapping: layers of the mapping network.
        channel_multiplier: a layer at resolution r has `min(max_channels, channel_base * channel_multiplier // r)`
            channels.
        max_channels: see `channel_multiplier`.
        image_channels: 3 for RGB.
        z_dim: length of z; None means `style_dim`.
        channel_base: see `channel_multiplier`; the published networks have 16384.
        channels: of the layers at 4, 8, ..., output_size, for networks that follow no rule; it takes the rule's place.

    Raises:
        UserError: for a size that is no power of two, a count below one, or `channels` of another length.
    """

    def __init__(
        self,
        output_size: int,
        style_dim: int = 512,
        n_mapping: int = 8,
        channel_multiplier: int = 2,
        max_channels: int = 512,
        image_channels: int = 3,
        z_dim: int | None = None,
        channel_base: int = 16384,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if output_size < 8 or output_size & (output_size - 1):
            raise UserError(f"Generator output_size={output_size}: it must be a power of two, 8 or more.")
        z_dim = style_dim if z_dim is None else z_dim
        self.config: dict[str, Any] = {
            "output_size": output_size,
            "style_dim": style_dim,
            "n_mapping": n_mapping,
            "channel_multiplier": channel_multiplier,
            "max_channels": max_channels,
            "image_channels": image_channels,
            "z_dim": z_dim,
            "channel_base": channel_base,
        }
        for name, value in self.config.items():
            if value < 1:
                raise UserError(f"Generator {name}={value}: it must be 1 or more.")
        self.output_size, self.style_dim, self.z_dim = output_size, style_dim, z_dim
        log_size = output_size.bit_length() - 1
        if channels is not None:
            self.config["channels"] = [int(width) for width in channels]
            if len(channels) != log_size - 1 or min(channels) < 1:
                raise UserError(f"Generator channels={list(channels)}: give {log_size - 1} counts, one a resolution.")
        self.n_styles = 2 * log_size - 2
        self.n_noises = 2 * log_size - 3

        layers = [EqualisedLinear(z_dim if i == 0 else style_dim, style_dim, 0, 0.01, True) for i in range(n_mapping)]
        self.style = nn.Sequential(PixelNorm(), *layers)

        def width_at(log_resolution: int) -> int:
            if channels is not None:
                return int(channels[log_resolution - 2])
            return max(1, min(max_channels, channel_base * channel_multiplier // 2**log_resolution))

        width = width_at(2)
        self.input = ConstantInput(width)
        self.conv1 = StyledConv(width, width, style_dim)
        self.to_rgb1 = ToRGB(width, image_channels, style_dim, up=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for log_resolution in range(3, log_size + 1):
            wider, width = width, width_at(log_resolution)
            self.convs.append(StyledConv(wider, width, style_dim, up=True))
            self.convs.append(StyledConv(width, width, style_dim))
            self.to_rgbs.append(ToRGB(width, image_channels, style_dim))
        self.noises = nn.Module()
        for i, side in enumerate(self.noise_sides()):
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, side, side))

    def noise_sides(self) -> list[int]:
        """Sides of the noise maps: 4, 8, 8, 16, 16, ..."""
        return [2 ** ((i + 5) // 2) for i in range(self.n_noises)]

    @classmethod
    def seeded(cls, seed: int, **config: Any) -> Generator:
        """An untrained generator whose weights depend on `seed` alone; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(**config)

    def mapping(self, z: Tensor) -> Tensor:
        """(B, z_dim) standard normal to w (B, style_dim).

        Raises:
            UserError: when z has another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise UserError(f"The mapping network takes z of shape (B, {self.z_dim}), got {tuple(z.shape)}.")
        return self.style(z)

    @staticmethod
    def truncate(w: Tensor, latent: Tensor, psi: float) -> Tensor:
        """Moves w (..., style_dim) towards `latent` (broadcastable): `latent + psi * (w - latent)`.

        Source: StyleGAN (arXiv:1812.04948), appendix B.
        """
        return latent + psi * (w - latent)

    @torch.no_grad()
    def latent_average(self, n: int = 100_000, seed: int = 0) -> Tensor:
        """Mean w (style_dim,) of `n` draws of z, from a random state of its own."""
        source = torch.Generator().manual_seed(seed)
        reference = self.input.input
        total = torch.zeros(self.style_dim, dtype=torch.float64)
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
            if given.ndim != 4 or tuple(given.shape[1:]) != (1, side, side):
                raise UserError(f"noise[{i}]: expected (1 or B, 1, {side}, {side}), got {tuple(given.shape)}.")
        return noise

    def synthesis(self, w_plus: Tensor, noise: Noise = "const") -> Tensor:
        """W+ codes to images.

        Args:
            w_plus: (B, n_styles, style_dim), or (B, style_dim) for the same w in every layer.
            noise: "const" for the stored maps, "random" for fresh ones (drawn layer by layer from the global random
                state), or `n_noises` maps (1 or B, 1, r, r), r = 4, 8, 8, 16, 16, ...

        Returns:
            (B, image_channels, output_size, output_size) float, about [-1, 1], not clamped.

        Raises:
            UserError: when a shape does not fit.
        """
        if w_plus.ndim == 2:
            w_plus = w_plus.unsqueeze(1).expand(-1, self.n_styles, -1)
        if w_plus.ndim != 3 or tuple(w_plus.shape[1:]) != (self.n_styles, self.style_dim):
            raise UserError(
                f"This {self.output_size} px generator takes codes (B, {self.n_styles}, {self.style_dim}), "
                f"got {tuple(w_plus.shape)}."
            )
        maps = self._noise_list(noise)
        styles = w_plus.unbind(1)
        x = self.input.input.expand(w_plus.shape[0], -1, -1, -1)  # (B, 512, 4, 4)
        x = self.conv1(x, styles[0], maps[0])  # (B, 512, 4, 4)
        image = self.to_rgb1(x, styles[1])  # (B, 3, 4, 4)
        for i, to_rgb in enumerate(self.to_rgbs):
            first = 2 * i + 1  # a ToRGB shares its style with the next block's first convolution
            resolution = 8 << i
            with self.precision(resolution, x.device):
                x, bound = self.cast(x, resolution), self.bound(resolution)
                x = self.convs[2 * i](x, styles[first], maps[first], bound)  # (B, C, 2H, 2W)
                x = self.convs[2 * i + 1](x, styles[first + 1], maps[first + 1], bound)
                image = to_rgb(x, styles[first + 2], image)  # (B, 3, 2H, 2W)
        return image

    def forward(self, z: Tensor, psi: float = 1.0, latent: Tensor | None = None, noise: Noise = "const") -> Tensor:
        """z (B, z_dim) to images, with truncation by `psi` towards `latent` (default: `latent_average()`)."""
        w = self.mapping(z)
        if psi != 1:
            w = self.truncate(w, self.latent_average() if latent is None else latent, psi)
        return self.synthesis(w, noise)

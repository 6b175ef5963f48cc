"""Convolution whose weights are scaled by a style, computed on the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.epilogue import modconv_epilogue


def demodulation(weight: Tensor, style: Tensor, eps: float = 1e-8) -> Tensor:
    """One over the expected standard deviation of each output channel.

    Args:
        weight: (O, I, k, k).
        style: (B, I).

    Returns:
        (B, O): `1 / sqrt(sum over I, k, k of (weight * style)^2 + eps)`.

    Source: StyleGAN2 (arXiv:1912.04958), equation 3.
    """
    return demodulation_from_energy(weight.square().sum((2, 3)), style, eps)


def demodulation_from_energy(energy: Tensor, style: Tensor, eps: float = 1e-8) -> Tensor:
    """`demodulation` from squares that were summed before: energy (O, I) and style (B, I) to (B, O)."""
    return (style.square() @ energy.t() + eps).rsqrt()


def modulated_convolution(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: bool = False,
    energy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution of `modulated_conv2d` and the factors that demodulate it, for `modconv_epilogue`.

    Args:
        x, weight, style, demodulate, up: as `modulated_conv2d` takes them.
        energy: (O, I), sums over the taps of the squared weights, where they are known.

    Returns:
        (B, O, H, W), or before the low-pass filter (B, O, 2H+k-2, 2W+k-2) with `up`; and (B, O), float32 or wider, or
        None without `demodulate`.

    Source: StyleGAN2 (arXiv:1912.04958), section 2.2, equations 1 and 3.
    """
    factor = None
    if demodulate:
        with torch.autocast(x.device.type, enabled=False):  # sums of squares leave half precision's range
            wide = torch.promote_types(weight.dtype, torch.float32)
            if energy is None:
                factor = demodulation(weight.to(wide), style.to(wide))
            else:
                factor = demodulation_from_energy(energy, style.to(energy.dtype))
    x = x * style[:, :, None, None].to(x.dtype)
    if up:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), factor
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2), factor


def blur_padding(blur: Tensor, size: int) -> tuple[int, int]:
    """Padding of the filter behind a transposed convolution of `size` that makes the result twice the input."""
    excess = blur.shape[-1] - 2 - (size - 1)
    return (excess + 1) // 2 + 1, excess // 2 + 1


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: bool = False,
    blur: Tensor | None = None,
) -> Tensor:
    """Style-modulated convolution, "same" padding, optionally with two-fold up-sampling.

    Scaling the weights by the style is scaling the input channels, and demodulating them is scaling the output
    channels; so one shared weight serves the whole batch and no per-sample weights or grouped convolutions are made.

    Args:
        x: (B, I, H, W) float.
        weight: (O, I, k, k), k odd, already multiplied by its equalised learning rate.
        style: (B, I), scale of each input channel.
        demodulate: normalise the outputs' expected variance.
        up: double the resolution, with a transposed convolution followed by `blur`.
        blur: (4, 4) low-pass filter with sum 4; required with `up`.

    Returns:
        (B, O, H, W), or (B, O, 2H, 2W) with `up`.

    Source: StyleGAN2 (arXiv:1912.04958), section 2.2, equations 1 and 3; checked against the weight-side form in the
    tests and the pSp reference (commit 5cfff38).
    """
    if up and blur is None:
        raise ValueError("modulated_conv2d(up=True) needs its blur filter.")
    x, factor = modulated_convolution(x, weight, style, demodulate, up)
    if up and blur is not None:
        return modconv_epilogue(x, blur, blur_padding(blur, weight.shape[-1]), factor, negative_slope=1, gain=1)
    return x if factor is None else modconv_epilogue(x, demod=factor, negative_slope=1, gain=1)

"""Convolution whose weights are scaled by a style, computed on the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.upfirdn import upfirdn2d


def demodulation(weight: Tensor, style: Tensor, eps: float = 1e-8) -> Tensor:
    """One over the expected standard deviation of each output channel.

    Args:
        weight: (O, I, k, k).
        style: (B, I).

    Returns:
        (B, O): `1 / sqrt(sum over I, k, k of (weight * style)^2 + eps)`.

    Source: StyleGAN2 (arXiv:1912.04958), equation 3.
    """
    energy = weight.square().sum((2, 3))  # (O, I)
    return (style.square() @ energy.t() + eps).rsqrt()


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
    factor = None
    if demodulate:
        with torch.autocast(x.device.type, enabled=False):  # sums of squares leave half precision's range
            wide = torch.promote_types(weight.dtype, torch.float32)
            factor = demodulation(weight.to(wide), style.to(wide))
    x = x * style[:, :, None, None].to(x.dtype)
    padding = weight.shape[-1] // 2
    if up:
        if blur is None:
            raise ValueError("modulated_conv2d(up=True) needs its blur filter.")
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # (B, O, 2H+k-2, 2W+k-2)
        excess = blur.shape[-1] - 2 - (weight.shape[-1] - 1)
        x = upfirdn2d(x, blur, padding=((excess + 1) // 2 + 1, excess // 2 + 1))
    else:
        x = F.conv2d(x, weight, padding=padding)
    return x if factor is None else x * factor[:, :, None, None].to(x.dtype)

"""Modulated convolution, computed by scaling activations instead of weights.

To modulate the weights is equivalent to scaling the input channels, and to demodulate them is equivalent to scaling the
output channels. The whole batch therefore shares one weight, without grouped convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.epilogue import modconv_epilogue


def demodulation(weight_sq_sum: Tensor, style: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the inverse of the expected standard deviation of each output channel, (B, O).

    It is `1 / sqrt(sum over I, k, k of (weight * style)^2 + eps)`. `weight_sq_sum` (O, I) contains the squared weights
    summed over the kernel; `style` is (B, I).

    Source: StyleGAN2 (arXiv:1912.04958), equation 3.
    """
    return (style.square() @ weight_sq_sum.t() + eps).rsqrt()


def modulated_convolution(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: bool = False,
    weight_sq_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve with modulated weights, without the FIR filter and demodulation, which `modconv_epilogue` applies.

    Args:
        x: (B, I, H, W) float.
        weight: (O, I, k, k), k odd, already multiplied by its equalised learning rate.
        style: (B, I), scale of each input channel.
        demodulate: normalise the expected variance of the outputs.
        up: double the resolution with a transposed convolution, which a FIR filter must follow.
        weight_sq_sum: see `demodulation`; None computes it.

    Returns:
        (B, O, H, W), or with `up` (B, O, 2H+k-2, 2W+k-2); and the demodulation factors (B, O) in float32 or wider, or
        None without `demodulate`.

    Source: StyleGAN2 (arXiv:1912.04958), section 2.2, equations 1 and 3; the tests compare it with modulated weights,
    and values are checked against the pSp reference (commit 5cfff38).
    """
    factor = None
    if demodulate:
        with torch.autocast(x.device.type, enabled=False):  # sums of squares exceed the range of half precision
            if weight_sq_sum is None:
                wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                weight_sq_sum = wide.square().sum((2, 3))
            factor = demodulation(weight_sq_sum, style.to(weight_sq_sum.dtype))
    x = modconv_epilogue(x, demod=style, negative_slope=1.0, gain=1.0)  # only scales, on CUDA at the speed of copying
    if up:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), factor
    side = int(weight.shape[-1])  # a trace of older PyTorch versions has tensors as sizes
    return F.conv2d(x, weight, padding=side // 2), factor

"""All that follows the convolution of a styled layer: filter, demodulation, noise, bias, activation, bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from psp_lightning.ops.bias_act import bias_act_ref
from psp_lightning.ops.dispatch import use_op
from psp_lightning.ops.upfirdn2d import upfirdn2d_ref


def modconv_epilogue(
    x: Tensor,
    blur: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """`clamp(gain * lrelu(demod * filter(x) + strength * noise + bias))`; on CUDA in one pass over memory.

    Args:
        x: (B, C, H, W) float, result of the convolution.
        blur: (kh, kw) low-pass filter that follows a transposed convolution, applied as by `upfirdn2d`; None: none.
        padding: of the filter.
        demod: (B, C), factor of each sample and channel; None: 1.
        noise: (1 or B, 1, H', W'); None: none.
        strength: (1,), factor of the noise; required with it.
        bias: (C,); None: 0.
        negative_slope: of the leaky ReLU; 1 with `gain=1`: no activation.
        gain: factor behind the activation.
        clamp: bound of the result's absolute value; None: none.

    Returns:
        (B, C, H', W') in x's dtype, where H' = H without a filter. In half precision the CUDA kernel rounds once, at
        the end, and plain PyTorch after each step.

    Source: StyleGAN2 (arXiv:1912.04958), figure 2 and appendix B.
    """
    if noise is not None and strength is None:
        raise ValueError("modconv_epilogue: noise needs its strength.")
    learned = blur is not None and blur.requires_grad
    if not learned and gain > 0 and negative_slope >= 0 and use_op(x):
        both = [] if blur is None else [*padding, *padding]
        bound = -1.0 if clamp is None else clamp
        return torch.ops.psp_lightning.epilogue(
            x, blur, both, demod, noise, strength, bias, negative_slope, gain, bound
        )
    if blur is not None:
        x = upfirdn2d_ref(x, blur, padding=(*padding, *padding))
    return epilogue_ref(x, demod, noise, strength, bias, negative_slope, gain, clamp)


def epilogue_ref(
    x: Tensor,
    demod: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    negative_slope: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """`modconv_epilogue` behind its filter, in plain PyTorch."""
    if demod is not None:
        x = x * demod[:, :, None, None].to(x.dtype)
    if noise is not None and strength is not None:
        x = x + (strength * noise).to(x.dtype)
    return bias_act_ref(x, None if bias is None else bias.to(x.dtype), negative_slope, gain, clamp)


def act_backward_ref(dy: Tensor, y: Tensor, negative_slope: float, gain: float, clamp: float) -> Tensor:
    """Gradient of gain, leaky ReLU and clamp (< 0: none), told from their result `y`; linear in `dy`."""
    du = torch.where(y > 0, dy * gain, dy * (gain * negative_slope))
    # the bound as y can hold it, since that is what y was clamped to
    return du if clamp < 0 else torch.where(y.abs() < torch.tensor(clamp, dtype=y.dtype), du, torch.zeros_like(du))


def epilogue_backward_ref(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    demod: Tensor | None,
    noise: Tensor | None,
    negative_slope: float,
    gain: float,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """What the gradient of an epilogue without filter needs in one pass.

    Returns:
        `demod * du` (B, C, ...) in dy's dtype, `du` being the gradient in front of the activation; and (B, C, 3): its
        sums over pixels of `du * x`, `du` and `du * noise`, in float32 or wider.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    du = (dy if y is None else act_backward_ref(dy, y, negative_slope, gain, clamp)).to(wide)
    flat = du.flatten(2) if du.ndim > 2 else du[..., None]  # (B, C, P)
    none = flat.new_zeros(flat.shape[:2])
    with_x = none if x is None else (flat * x.to(wide).reshape(flat.shape)).sum(2)
    with_noise = none if noise is None else (flat * noise.to(wide).flatten(2)).sum(2)
    sums = torch.stack([with_x, flat.sum(2), with_noise], 2)
    g = du if demod is None else du * demod[:, :, None, None].to(wide)
    return g.to(dy.dtype), sums

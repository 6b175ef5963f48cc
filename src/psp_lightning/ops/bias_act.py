"""Bias, leaky ReLU, gain and clamp in one step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.dispatch import use_op


def fused_leaky_relu(
    x: Tensor,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """Compute `scale * leaky_relu(x + bias)`, clamped to `[-clamp, clamp]`.

    Args:
        x: (B, C, ...) float.
        bias: (C,), added along dimension 1; None adds nothing.
        negative_slope: slope for negative values.
        scale: gain; the default keeps the variance of a standard normal input near one.
        clamp: bound of the absolute value of the result; None: no bound.

    Returns:
        A tensor with the shape of `x`, in the dtype to which the dtypes of `x` and `bias` promote.

    Source: StyleGAN2 (arXiv:1912.04958), appendix B, with values checked against the pSp reference, commit 5cfff38; the
    clamp is from StyleGAN2-ADA (arXiv:2006.06676), appendix D.
    """
    fits = bias is None or torch.promote_types(x.dtype, bias.dtype) == x.dtype
    # the kernel derives the gradient from the sign of the result, which requires these signs
    if fits and scale > 0 and negative_slope >= 0 and use_op(x):
        return torch.ops.psp_lightning.epilogue(
            x, None, [], None, None, None, bias, negative_slope, scale, -1.0 if clamp is None else clamp
        )
    return bias_act_ref(x, bias, negative_slope, scale, clamp)


def bias_act_ref(
    x: Tensor, bias: Tensor | None, negative_slope: float, scale: float, clamp: float | None = None
) -> Tensor:
    """Compute `fused_leaky_relu` in plain PyTorch, for any device and any order of derivative."""
    if bias is not None:
        x = x + bias.view(1, -1, *([1] * (x.ndim - 2)))
    if negative_slope != 1:
        x = F.leaky_relu(x, negative_slope)
    if scale != 1:
        x = x * scale
    return x if clamp is None else x.clamp(-clamp, clamp)

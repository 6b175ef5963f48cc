"""Bias, leaky ReLU and gain in one step."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def fused_leaky_relu(
    x: Tensor, bias: Tensor | None = None, negative_slope: float = 0.2, scale: float = math.sqrt(2)
) -> Tensor:
    """`scale * leaky_relu(x + bias)`.

    Args:
        x: (B, C, ...) float.
        bias: (C,), added along dimension 1; None adds nothing.
        negative_slope: slope for negative values.
        scale: gain; the default keeps the variance of a standard normal input near one.

    Returns:
        Same shape and dtype as `x` (promoted with `bias`).

    Source: StyleGAN2 (arXiv:1912.04958), appendix B; values checked against the pSp reference, commit 5cfff38.
    """
    if bias is not None:
        x = x + bias.view(1, -1, *([1] * (x.ndim - 2)))
    return F.leaky_relu(x, negative_slope) * scale

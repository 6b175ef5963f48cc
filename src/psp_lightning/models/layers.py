"""Linear layer with an equalised learning rate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.ops import fused_leaky_relu


class EqualisedLinear(nn.Module):
    """Linear layer whose stored weights have unit variance and are scaled when used.

    Args:
        in_features, out_features: sizes.
        bias_init: first value of the (used) bias.
        lr_multiplier: factor of the effective learning rate of weight and bias.
        activation: follow with `fused_leaky_relu`.

    Source: Karras et al., Progressive GAN (arXiv:1710.10196), section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
        activation: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.scale = lr_multiplier / math.sqrt(in_features)
        self.lr_multiplier = lr_multiplier
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) to (B, out_features)."""
        bias = self.bias * self.lr_multiplier
        if self.activation:
            return fused_leaky_relu(F.linear(x, self.weight * self.scale), bias)
        return F.linear(x, self.weight * self.scale, bias)

"""Random inputs that are equal for all sides, because they are drawn on the CPU from a seed."""

from __future__ import annotations

import torch
from torch import Tensor


def images(seed: int, batch: int, size: int, device: str) -> Tensor:
    """Return (batch, 3, size, size) in [-1, 1]."""
    source = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=source) * 2 - 1).to(device)


def codes(seed: int, batch: int, n_styles: int, style_dim: int, device: str) -> Tensor:
    """Return (batch, n_styles, style_dim), standard normal."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n_styles, style_dim, generator=source).to(device)

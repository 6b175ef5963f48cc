"""Mean over the pixels of each channel."""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_mean(x: Tensor) -> Tensor:
    """Return `x.mean((2, 3), keepdim=True)`, (B, C, 1, 1) for x (B, C, H, W), in the dtype of x.

    On the CPU this is a sum and a division, because the gradient of the mean would be materialised in full, in another
    memory layout than x. For float16, whose range the sums of large maps exceed, it is PyTorch's mean.
    """
    if x.device.type == "cpu" and x.dtype != torch.float16:
        return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    return x.mean((2, 3), keepdim=True)

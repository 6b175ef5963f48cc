"""Mean over the pixels of each channel."""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_mean(x: Tensor) -> Tensor:
    """Return `x.mean((2, 3), keepdim=True)`, (B, C, 1, 1) of x (B, C, H, W), in x's dtype.

    On the CPU it is a sum and a division: the gradient of the mean would be written out in full, and in another order
    in memory than x's. Sums of large maps exceed float16's range, so there it is PyTorch's mean.
    """
    if x.device.type == "cpu" and x.dtype != torch.float16:
        return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    return x.mean((2, 3), keepdim=True)

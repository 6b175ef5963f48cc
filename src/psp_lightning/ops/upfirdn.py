"""Up-sample, filter, down-sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fir_kernel(taps: Sequence[float] = (1, 3, 3, 1), gain: float = 1.0) -> Tensor:
    """Separable low-pass filter: the (n, n) float32 outer product of `taps`, with sum `gain`."""
    row = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(row, row)
    return kernel / kernel.sum() * gain


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Inserts zeros, pads, convolves every channel with `kernel`, keeps every `down`-th pixel.

    Args:
        x: (B, C, H, W) float.
        kernel: (kh, kw), applied as a true convolution (flipped).
        up: factor of up-sampling; each pixel is followed by `up - 1` zeros, also the last.
        down: factor of down-sampling.
        padding: zeros before and after, the same for both axes; negative numbers crop.

    Returns:
        (B, C, H', W') with `H' = (H * up + sum(padding) - kh) // down + 1`.

    Source: Karras et al., StyleGAN2 (arXiv:1912.04958), released code's operator of this name; values checked
    against a naive implementation in the tests and, inside the generator, the pSp reference (commit 5cfff38).
    """
    channels = x.shape[1]
    kernel = kernel.to(x.dtype)
    kh, kw = kernel.shape
    before, after = padding
    if up == 1:
        weight = kernel.flip(0, 1).expand(channels, 1, kh, kw)
        if before == after and before >= 0:
            return F.conv2d(x, weight, stride=down, padding=before, groups=channels)
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=down, groups=channels)
    # A transposed convolution scatters the kernel without computing with the zeros in between. Its result is the full
    # convolution, from which the padded one is cut out.
    weight = kernel.expand(channels, 1, kh, kw)
    full = F.conv_transpose2d(x, weight, stride=up, groups=channels)  # (B, C, (H-1)*up+kh, (W-1)*up+kw)
    cut = (before - kw + 1, up + after - kw, before - kh + 1, up + after - kh)
    out = F.pad(full, cut)
    return out if down == 1 else out[:, :, ::down, ::down]

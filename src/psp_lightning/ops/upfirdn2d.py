"""Up-sample, filter, down-sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.dispatch import use_op


def fir_kernel(taps: Sequence[float] = (1, 3, 3, 1), gain: float = 1.0) -> Tensor:
    """Separable low-pass filter: the (n, n) float32 outer product of `taps`, with sum `gain`."""
    row = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(row, row)
    return kernel / kernel.sum() * gain


def upfirdn2d(
    x: Tensor,
    kernel: Tensor,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Inserts zeros, pads, convolves every channel with `kernel`, keeps every `down`-th pixel.

    Args:
        x: (B, C, H, W) float.
        kernel: (kh, kw), applied as a true convolution (turned by 180 degrees).
        up: factor of up-sampling; each pixel is followed by `up - 1` zeros, also the last.
        down: factor of down-sampling.
        padding: zeros before and after, the same for both axes; negative numbers crop.
        flip: apply the kernel as it is, as a correlation.
        gain: factor of the result.

    Returns:
        (B, C, H', W') with `H' = (H * up + sum(padding) - kh) // down + 1`.

    Source: Karras et al., StyleGAN2 (arXiv:1912.04958), released code's operator of this name; values checked
    against a naive implementation in the tests and, inside the generator, the pSp reference (commit 5cfff38).
    """
    both = (*padding, *padding)
    if not kernel.requires_grad and use_op(x):
        return torch.ops.psp_lightning.upfirdn2d(x, kernel, [up, up], [down, down], both, flip, gain)
    return upfirdn2d_ref(x, kernel, (up, up), (down, down), both, flip, gain)


def upfirdn2d_ref(
    x: Tensor,
    kernel: Tensor,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """`upfirdn2d` in plain PyTorch, with factors (y, x) and padding (top, bottom, left, right)."""
    channels = x.shape[1]
    kernel = kernel.to(x.dtype)
    if gain != 1:
        kernel = kernel * gain
    kh, kw = kernel.shape
    top, bottom, left, right = padding
    if up[0] == 1 and up[1] == 1:
        weight = (kernel if flip else kernel.flip(0, 1)).expand(channels, 1, kh, kw)
        stride = (down[0], down[1])
        if top == bottom and left == right and top >= 0 and left >= 0:
            return F.conv2d(x, weight, stride=stride, padding=(top, left), groups=channels)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride, groups=channels)
    # A transposed convolution scatters the kernel without computing with the zeros in between. Its result is the full
    # convolution, from which the padded one is cut out.
    weight = (kernel.flip(0, 1) if flip else kernel).expand(channels, 1, kh, kw)
    full = F.conv_transpose2d(x, weight, stride=(up[0], up[1]), groups=channels)  # (B, C, (H-1)*up+kh, (W-1)*up+kw)
    cut = (left - kw + 1, up[1] + right - kw, top - kh + 1, up[0] + bottom - kh)
    out = F.pad(full, cut)
    return out if down[0] == down[1] == 1 else out[:, :, :: down[0], :: down[1]]


def output_size(size: int, up: int, down: int, before: int, after: int, taps: int) -> int:
    """Length of one axis after `upfirdn2d`."""
    return (size * up + before + after - taps) // down + 1


def adjoint_padding(
    size: Sequence[int], out: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int],
    taps: Sequence[int],
) -> list[int]:  # fmt: skip
    """Padding (top, bottom, left, right) with which `upfirdn2d` is its own adjoint, factors exchanged, filter flipped.

    With `out[o] = sum_i f[i] z[o * down + i - p]` the adjoint sends `o` to the `r` with `r * up = o * down + i - p`,
    for each tap i. As a filter over the zero-inserted output, at `v = o * down = r * up + j - q`, it has
    `i = p + q - j`: the taps in reverse order for `q = taps - 1 - p`. The padding after it makes the size come out.
    """
    result = []
    for axis in (0, 1):
        before = taps[axis] - 1 - padding[2 * axis]
        after = (size[axis] - 1) * up[axis] - out[axis] * down[axis] + 1 + padding[2 * axis]
        result += [before, after]
    return result

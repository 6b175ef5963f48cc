"""Upsample, apply a FIR filter, downsample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cuda import launch
from psp_lightning.ops.dispatch import kernels_for, register_op, use_op


def fir_filter(taps: Sequence[float] = (1, 3, 3, 1), gain: float = 1.0) -> Tensor:
    """Return a separable low-pass FIR filter: the (n, n) float32 outer product of `taps`, scaled to sum to `gain`."""
    row = torch.tensor(taps, dtype=torch.float32)
    fir = torch.outer(row, row)
    return fir / fir.sum() * gain


def upfirdn2d(
    x: Tensor,
    fir: Tensor,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Insert zeros, pad, convolve every channel with `fir`, and keep every `down`-th pixel.

    Args:
        x: (B, C, H, W) float.
        fir: (kh, kw) FIR filter, applied as a true convolution (rotated by 180 degrees).
        up: upsampling factor; `up - 1` zeros follow each pixel, including the last.
        down: downsampling factor.
        padding: zeros before and after, the same for both axes; negative numbers crop.
        flip: apply the filter unrotated, as a correlation.
        gain: factor of the result.

    Returns:
        (B, C, H', W') with `H' = (H * up + sum(padding) - kh) // down + 1`.

    Source: Karras et al., StyleGAN2 (arXiv:1912.04958), the operator of this name in the released code; the tests
    compare it with a naive implementation and, inside the generator, with the pSp reference (commit 5cfff38).
    """
    both = (*padding, *padding)
    if not fir.requires_grad and use_op(x):
        return torch.ops.psp_lightning.upfirdn2d(x, fir, [up, up], [down, down], both, flip, gain)
    return upfirdn2d_ref(x, fir, (up, up), (down, down), both, flip, gain)


def upfirdn2d_ref(
    x: Tensor,
    fir: Tensor,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Compute `upfirdn2d` in plain PyTorch, with factors (y, x) and padding (top, bottom, left, right).

    The result has the dtype of `x`, as with the kernels: autocast does not lower it.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return upfirdn2d_ref(x, fir, up, down, padding, flip, gain)
    if not torch.jit.is_tracing() and 0 in x.shape[2:]:  # only padding, which PyTorch's convolutions reject
        return x.new_zeros(filtered_shape(x, fir, padding, up, down)) + x.sum()
    channels = x.shape[1]
    fir = fir.to(x.dtype)
    if gain != 1:
        fir = fir * gain
    kh, kw = fir.shape
    top, bottom, left, right = padding
    if up[0] == 1 and up[1] == 1:
        weight = (fir if flip else fir.flip(0, 1)).expand(channels, 1, kh, kw)
        stride = (down[0], down[1])
        if top == bottom and left == right and top >= 0 and left >= 0:
            return F.conv2d(x, weight, stride=stride, padding=(top, left), groups=channels)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride, groups=channels)
    # A transposed convolution scatters the filter without multiplying inserted zeros. The padded convolution is cropped
    # from its result, the full convolution.
    weight = (fir.flip(0, 1) if flip else fir).expand(channels, 1, kh, kw)
    full = F.conv_transpose2d(x, weight, stride=(up[0], up[1]), groups=channels)  # (B, C, (H-1)*up+kh, (W-1)*up+kw)
    cut = (left - kw + 1, up[1] + right - kw, top - kh + 1, up[0] + bottom - kh)
    out = F.pad(full, cut)
    return out if down[0] == down[1] == 1 else out[:, :, :: down[0], :: down[1]]


def filtered_shape(
    x: Tensor, fir: Tensor, padding: Sequence[int], up: Sequence[int] = (1, 1), down: Sequence[int] = (1, 1)
) -> list[int]:
    """Return the shape of the result of `upfirdn2d`."""
    sides = [
        (x.shape[2 + axis] * up[axis] + sum(padding[2 * axis : 2 * axis + 2]) - fir.shape[axis]) // down[axis] + 1
        for axis in (0, 1)
    ]
    return [*x.shape[:2], *sides]


def adjoint_padding(
    size: Sequence[int], out: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int],
    taps: Sequence[int],
) -> list[int]:  # fmt: skip
    """Return the padding (top, bottom, left, right) of the adjoint of `upfirdn2d`.

    The adjoint is `upfirdn2d` with `up` and `down` exchanged and the filter flipped.

    For `out[o] = sum_i f[i] z[o * down + i - p]` the adjoint maps `o` to the `r` with `r * up = o * down + i - p`, for
    each tap i. As a filter over the zero-inserted output, at `v = o * down = r * up + j - q`, it uses the tap
    `i = p + q - j`: the taps in reverse order for `q = taps - 1 - p`. The padding after follows from the size.
    """
    result = []
    for axis in (0, 1):
        before = taps[axis] - 1 - padding[2 * axis]
        after = (size[axis] - 1) * up[axis] - out[axis] * down[axis] + 1 + padding[2 * axis]
        result += [before, after]
    return result


# The registered operator: a linear map whose adjoint is the same operator with other arguments.


@register_op(
    "upfirdn2d(Tensor x, Tensor fir, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip, float gain) -> Tensor"
)
def _op(
    x: Tensor, fir: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int], flip: bool, gain: float
) -> Tensor:
    if kernels := kernels_for(x):
        shape = filtered_shape(x, fir, padding, up, down)
        return launch.upfirdn2d(kernels, x, fir, up, down, padding, flip, gain, shape)
    return launch.ordered(upfirdn2d_ref(x, fir, up, down, padding, flip, gain), x)


@torch.library.register_fake("psp_lightning::upfirdn2d")
def _(x: Tensor, fir: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int], *_: Any) -> Tensor:
    return launch.empty(x, filtered_shape(x, fir, padding, up, down))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fir, up, down, padding, flip, gain = inputs
    ctx.save_for_backward(fir)
    ctx.arguments = (up, down, flip, gain)
    ctx.padding = adjoint_padding(x.shape[2:], output.shape[2:], up, down, padding, fir.shape)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (fir,) = ctx.saved_tensors
    up, down, flip, gain = ctx.arguments
    dx = torch.ops.psp_lightning.upfirdn2d(dy, fir, down, up, ctx.padding, not flip, gain)
    return dx, None, None, None, None, None, None


torch.library.register_autograd("psp_lightning::upfirdn2d", _backward, setup_context=_save)

"""Winograd's algorithm for 3x3 convolutions with constant weights, on the CPU in float32.

It needs a quarter of the multiplications: a tile of 4x4 results takes 36 for each pair of channels instead of 144.
Tiles of 6x6 pixels are transformed by `B` and the weights by `G`; they are multiplied elementwise and transformed back
by `A`. Over all channels and tiles these multiplications are 36 matrix products.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4, F(4x4, 3x3).
The interpolation points differ from theirs (0, +-1, +-2): 0, +-3/4, +-3/2 halve the rounding errors, which are then
twice as large as in oneDNN's convolution in the same memory layout. A pixel that is not finite spoils its whole tile.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from numpy.polynomial.polynomial import polyfromroots
from torch import Tensor

from psp_lightning.ops.cpu.product import has_onednn, product
from psp_lightning.ops.dispatch import is_captured

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity
CHANNELS, TILES = 256, 64  # fewest with which it was faster than oneDNN's convolution in measurements
NUMBERS = 1 << 22  # elements of transformed tiles per product: fewer are slow, more exceed the cache


def winograd_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether `winograd_conv` supports x (B, I, H, W) and weight (O, I, k, k), and is faster for their sizes."""
    if x.ndim != 4 or not x.dtype == weight.dtype == torch.float32 or not x.device.type == weight.device.type == "cpu":
        return False
    batch, _, height, width = x.shape
    sizes = weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= CHANNELS and height % 4 == width % 4 == 0
    return sizes and batch * height * width >= 16 * TILES and has_onednn() and _is_exact() and not is_captured()


def _is_exact() -> bool:
    """Return whether matrix products use full precision.

    PyTorch's setting for lower precision does not apply to convolutions, and its errors would grow here.
    """
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # PyTorch cannot answer if the precision was set per backend
        return False


def winograd_weight(weight: Tensor) -> Tensor:
    """Transform weights (O, I, 3, 3) to (36, O, I) for `winograd_conv`: four times as many numbers."""
    g = _matrices()[1]
    taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return product(torch.kron(g, g).to(taps), taps).view(36, *weight.shape[:2])


def winograd_conv(x: Tensor, weight: Tensor, adjoint: bool = False) -> Tensor:
    """Compute `F.conv2d(x, w, padding=1)`, or its adjoint, `F.conv_transpose2d(x, w, padding=1)`.

    Args:
        x: (B, I, H, W) float32, or with `adjoint` (B, O, H, W); H and W are multiples of four.
        weight: `winograd_weight(w)`, (36, O, I).
        adjoint: convolve with the rotated weights, from O channels to I.

    Returns:
        (B, O, H, W), or with `adjoint` (B, I, H, W), in channels_last layout; it has no derivative.
    """
    into, back = _transforms(adjoint)
    matrices = weight if adjoint else weight.transpose(1, 2)  # (36, channels of x, channels of the result)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # (6, 6, B, tiles, tiles, channels)
    y = x.new_empty(len(x), *x.shape[2:], matrices.shape[2])
    results = y.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(2, 4, 0, 1, 3, 5)  # (4, 4, B, tiles, tiles, ...)
    for chunk in _chunks(windows, max(matrices.shape[1:])):
        tiles = windows[chunk].contiguous()
        size = tiles.shape[2:5]
        tiles = product(into, tiles.view(36, -1)).view(36, -1, matrices.shape[1])
        tiles = torch.cat([product(t, w) for t, w in zip(tiles, matrices, strict=True)])
        results[chunk].copy_(product(back, tiles.view(36, -1)).view(4, 4, *size, -1))
    return y.permute(0, 3, 1, 2)


def _chunks(windows: Tensor, channels: int) -> list[tuple[slice, ...]]:
    """Return indices of the windows in chunks of `NUMBERS` elements: several images, or rows of tiles of one image."""
    _, _, batch, rows, columns, _ = windows.shape
    step = max(1, NUMBERS // (36 * channels * columns))
    images, rest = max(1, step // rows), min(step, rows)
    every = slice(None)
    return [
        (every, every, slice(i, i + images), slice(j, j + rest))
        for i in range(0, batch, images)
        for j in range(0, rows, rest)
    ]


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Return A (6, 4), G (6, 3) and B (6, 6) in float64.

    `A^T ((G g) * (B d))` is `[sum(d[i : i + 3] * g) for i in range(4)]`.

    They follow from the transposed Toom-Cook theorem: A and G evaluate polynomials at the points, and B has the
    coefficients of the interpolating polynomials.
    """
    a = [[p**i for i in range(4)] for p in POINTS] + [[0.0, 0.0, 0.0, 1.0]]
    scale = [prod(p - q for q in POINTS if q != p) for p in POINTS]
    g = [[p**i / s for i in range(3)] for p, s in zip(POINTS, scale, strict=True)] + [[0.0, 0.0, 1.0]]
    b = [[*polyfromroots([q for q in POINTS if q != p]), 0.0] for p in POINTS] + [[*polyfromroots(POINTS)]]
    with torch.inference_mode(False):
        return tuple(torch.tensor(m, dtype=torch.float64, device="cpu") for m in (a, g, b))  # type: ignore[return-value]


@cache
def _transforms(adjoint: bool) -> tuple[Tensor, Tensor]:
    """Return the matrices from the 36 pixels of a tile to its transform, and from a transform to the 16 results.

    A convolution with rotated weights is one with rotated source and result tiles.
    """
    a, _, b = _matrices()
    with torch.inference_mode(False):
        into, back = torch.kron(b, b), torch.kron(a, a).t()
        if adjoint:
            into, back = into.flip(1), back.flip(0)
        return into.float().contiguous(), back.float().contiguous()

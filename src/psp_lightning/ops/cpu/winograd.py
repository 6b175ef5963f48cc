"""3x3 convolutions with constant weights by Winograd's algorithm: a quarter of the multiplications, on the CPU in
float32.

Four by four results of a tile take 36 multiplications for each pair of channels, and not 144: tiles of 6x6 pixels and
the weights are transformed by `B` and `G`, multiplied number by number, and transformed back by `A`. Over channels and
tiles the multiplications are 36 matrix products.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4, F(4x4, 3x3).
The points of interpolation are not theirs (0, +-1, +-2): with 0, +-3/4, +-3/2 rounding errors are half of theirs, and
twice those of oneDNN's convolution in the same order of memory. A pixel that is not finite spoils its whole tile.
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
CHANNELS, TILES = 256, 64  # from which it was measured to be faster than oneDNN's convolution
NUMBERS = 1 << 22  # of transformed tiles at a time: less makes the products slow, more falls out of the cache


def winograd_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether `winograd_conv` was made for x (B, I, H, W) and weight (O, I, k, k) of this kind and size."""
    if x.ndim != 4 or not x.dtype == weight.dtype == torch.float32 or not x.device.type == weight.device.type == "cpu":
        return False
    batch, _, height, width = x.shape
    sizes = weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= CHANNELS and height % 4 == width % 4 == 0
    return sizes and batch * height * width >= 16 * TILES and has_onednn() and _is_exact() and not is_captured()


def _is_exact() -> bool:
    """Return whether products are in full precision. PyTorch's setting of a lower one does not concern convolutions,
    and its errors would grow here."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for each backend, which this function of PyTorch's does not answer
        return False


def winograd_weight(weight: Tensor) -> Tensor:
    """Transform (O, I, 3, 3) to what `winograd_conv` takes, (36, O, I): four times as many numbers."""
    g = _matrices()[1]
    taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return product(torch.kron(g, g).to(taps), taps).view(36, *weight.shape[:2])


def winograd_conv(x: Tensor, weight: Tensor, adjoint: bool = False) -> Tensor:
    """Compute `F.conv2d(x, w, padding=1)`, or its derivative by x, `F.conv_transpose2d(x, w, padding=1)`.

    Args:
        x: (B, I, H, W) float32, or with `adjoint` (B, O, H, W); H and W are multiples of four.
        weight: `winograd_weight(w)`, (36, O, I).
        adjoint: convolve with the weights turned round, from O channels to I.

    Returns:
        (B, O, H, W), or (B, I, H, W), in channels_last order; it has no derivative.
    """
    into, back = _transforms(adjoint)
    matrices = weight if adjoint else weight.transpose(1, 2)  # (36, channels of x, channels of the result)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # (6, 6, B, tiles, tiles, channels)
    y = x.new_empty(len(x), *x.shape[2:], matrices.shape[2])
    results = y.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).permute(2, 4, 0, 1, 3, 5)  # (4, 4, B, tiles, tiles, ...)
    for some in _few(windows, max(matrices.shape[1:])):
        tiles = windows[some].contiguous()
        size = tiles.shape[2:5]
        tiles = product(into, tiles.view(36, -1)).view(36, -1, matrices.shape[1])
        tiles = torch.cat([product(t, w) for t, w in zip(tiles, matrices, strict=True)])
        results[some].copy_(product(back, tiles.view(36, -1)).view(4, 4, *size, -1))
    return y.permute(0, 3, 1, 2)


def _few(windows: Tensor, channels: int) -> list[tuple[slice, ...]]:
    """Return indices of some images, or of some rows of tiles of one."""
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

    By the theorem of Toom and Cook, transposed: A and G evaluate polynomials at the points, B has the coefficients of
    the polynomials that interpolate.
    """
    a = [[p**i for i in range(4)] for p in POINTS] + [[0.0, 0.0, 0.0, 1.0]]
    scale = [prod(p - q for q in POINTS if q != p) for p in POINTS]
    g = [[p**i / s for i in range(3)] for p, s in zip(POINTS, scale, strict=True)] + [[0.0, 0.0, 1.0]]
    b = [[*polyfromroots([q for q in POINTS if q != p]), 0.0] for p in POINTS] + [[*polyfromroots(POINTS)]]
    with torch.inference_mode(False):
        return tuple(torch.tensor(m, dtype=torch.float64, device="cpu") for m in (a, g, b))  # type: ignore[return-value]


@cache
def _transforms(adjoint: bool) -> tuple[Tensor, Tensor]:
    """Return the matrices that take the 36 pixels of a tile to its transform, and a transform to the 16 results.

    A convolution with weights turned round is one with tiles turned round, source and result.
    """
    a, _, b = _matrices()
    with torch.inference_mode(False):
        into, back = torch.kron(b, b), torch.kron(a, a).t()
        if adjoint:
            into, back = into.flip(1), back.flip(0)
        return into.float().contiguous(), back.float().contiguous()

"""Discriminator augmentation: differentiable, invertible on average, applied with probability p.

Source: Karras et al., StyleGAN2-ADA (arXiv:2006.06676), section 2 and appendix B: pixel blitting, geometric and colour
transformations ("bgc"), with the order and strengths of the paper's listing.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Low-pass decomposition filter of the symlet with six vanishing moments. The tests check its defining equations.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


class RandomNumbers(Protocol):
    """A source of random numbers of shape (n, *shape): standard normal, or uniform in [0, 1)."""

    def normal(self, n: int, *shape: int) -> Tensor: ...
    def uniform(self, n: int, *shape: int) -> Tensor: ...


def augment(images: Tensor, p: float, draws: RandomNumbers) -> Tensor:
    """Apply each transformation to each image with probability `p`, independently.

    Args:
        images: (B, C, H, W) float, about [-1, 1]. With 3 channels colours change, otherwise brightness and contrast.
        p: from 0 (returns the images unchanged) to 1.
        draws: source of random numbers.

    Returns:
        Images of the same shape, twice differentiable with respect to the input.
    """
    if p <= 0:
        return images
    matrix = _geometry(images.shape[0], images.shape[-1], p, draws).to(images.device)
    images = warp(images, matrix)
    return _recolour(images, _colours(images.shape[0], p, draws).to(images.device))


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Resample images by an affine map, with mirrored borders and a wavelet low-pass filter against aliasing.

    The up-sampling filter and the down-sampling filter are each other's transpose, so the identity map returns the
    image unchanged except for a few pixels at the border. Positions are relative to the filter's centre of mass, which
    avoids a shift.

    Args:
        images: (B, C, S, S), S at least 8.
        matrix: (B, 3, 3), maps output to input positions, in units of half the image's side, with the centre at zero.

    Source: StyleGAN2-ADA (arXiv:2006.06676), appendix B.2: two-fold up-sampling with the SYM6 filter, bilinear lookup,
    down-sampling with the same filter.
    """
    side, matrix = images.shape[-1], matrix.to(images.dtype)
    taps = torch.tensor(SYM6, dtype=images.dtype, device=images.device)
    taps = taps / taps.sum()
    centre = sum(i * tap for i, tap in enumerate(SYM6)) / sum(SYM6)  # 5.1: pixel i lies at 2i + centre on the fine grid
    margin = 4  # pixels that the filter needs beyond the border
    fine = _up(F.pad(images, (margin,) * 4, mode="reflect"), taps)  # (B, C, 2S + 18, 2S + 18)
    steps = torch.arange(2 * side + len(SYM6) - 2, dtype=images.dtype, device=images.device)
    steps = ((steps - centre) + 1) / side - 1  # everything that the down-sampling filter reads
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1)  # (2S + 10, 2S + 10, 3)
    pixels = ((points @ matrix[:, :2].transpose(1, 2)[:, None] + 1) * side - 1) / 2  # (B, 2S + 10, 2S + 10, 2)
    last = side - 1
    pixels = last - (pixels.remainder(2 * last) - last).abs()  # mirrored at the outermost pixels, repeatedly
    grid = (2 * (2 * (pixels + margin) + centre) + 1) / fine.shape[-1] - 1
    return _down(_Lookup.apply(fine, grid), taps)


def _kernels(taps: Tensor, channels: int) -> list[tuple[Tensor, tuple[int, int]]]:
    """Return depthwise kernels and strides, first for rows, then for columns."""
    n = len(taps)
    tall, wide = taps.view(1, 1, n, 1), taps.view(1, 1, 1, n)
    return [(tall.expand(channels, 1, n, 1), (2, 1)), (wide.expand(channels, 1, 1, n), (1, 2))]


def _up(x: Tensor, taps: Tensor) -> Tensor:
    """Up-sample (B, C, n, n) to (B, C, 2n + 10, 2n + 10): insert zeros and filter, keeping the mean."""
    for weight, stride in _kernels(taps * 2, x.shape[1]):
        x = F.conv_transpose2d(x, weight, stride=stride, groups=x.shape[1])
    return x


def _down(x: Tensor, taps: Tensor) -> Tensor:
    """Down-sample (B, C, 2n + 10, 2n + 10) to (B, C, n, n): the transpose of `_up`, keeping the mean."""
    for weight, stride in _kernels(taps, x.shape[1]):
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1])
    return x


class _Lookup(torch.autograd.Function):
    """A bilinear `grid_sample` with a second derivative, which PyTorch's version lacks. It is linear in its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _LookupAdjoint.apply(grads[0], grid, ctx.shape), None


class _LookupAdjoint(torch.autograd.Function):
    """The transpose of `_Lookup`, whose own transpose is `_Lookup`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        empty = grad.new_empty(1).expand(shape)  # only its shape is used
        bilinear, border = 0, 1
        return torch.ops.aten.grid_sampler_2d_backward(
            grad.contiguous(), empty, grid, bilinear, border, False, [True, False]
        )[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _Lookup.apply(grads[0], grid), None, None


def _when(n: int, p: float, draws: RandomNumbers, value: Tensor, neutral: float) -> Tensor:
    """Return `value` (n,) with probability `p`, otherwise `neutral`."""
    return torch.where(draws.uniform(n) < p, value, torch.full_like(value, neutral))


def _geometry(n: int, side: int, p: float, draws: RandomNumbers) -> Tensor:
    """Return (n, 3, 3) maps from output to input positions; each step of the listing acts before the previous one."""
    pi, ln2 = math.pi, math.log(2)
    steps = []
    mirror = _when(n, p, draws, draws.uniform(n).mul(2).floor(), 0)
    steps.append(_diagonal(1 - 2 * mirror, torch.ones_like(mirror)))
    turn = _when(n, p, draws, draws.uniform(n).mul(4).floor(), 0)
    steps.append(_rotation(turn * pi / 2))
    shift = draws.uniform(n, 2) * 0.25 - 0.125
    applied = _when(n, p, draws, torch.ones_like(mirror), 0)[:, None]
    steps.append(_translation((shift * applied * side).round() / side * 2))  # whole pixels; units of half a side
    size = _when(n, p, draws, (draws.normal(n) * 0.2 * ln2).exp(), 1)
    steps.append(_diagonal(1 / size, 1 / size))
    rotated = 1 - math.sqrt(1 - p)  # for each of two rotations; at least one happens with probability p
    steps.append(_rotation(_when(n, rotated, draws, draws.uniform(n) * 2 * pi - pi, 0)))
    stretch = _when(n, p, draws, (draws.normal(n) * 0.2 * ln2).exp(), 1)
    steps.append(_diagonal(1 / stretch, stretch))
    steps.append(_rotation(_when(n, rotated, draws, draws.uniform(n) * 2 * pi - pi, 0)))
    shift = draws.normal(n, 2) * 0.125
    steps.append(_translation(shift * _when(n, p, draws, torch.ones_like(mirror), 0)[:, None] * 2))
    matrix = torch.eye(3, device=mirror.device).expand(n, 3, 3)
    for step in steps:
        matrix = matrix @ step
    return matrix


def _colours(n: int, p: float, draws: RandomNumbers) -> Tensor:
    """Return (n, 4, 4) affine maps of RGB."""
    pi, ln2 = math.pi, math.log(2)
    brightness = _when(n, p, draws, draws.normal(n) * 0.2, 0)
    device = brightness.device
    axis = (torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)).to(device)
    grey = torch.outer(axis, axis)  # projection onto the luma axis
    eye = torch.eye(4, device=device)
    matrix = eye.repeat(n, 1, 1)
    matrix[:, :3, 3] = brightness[:, None]
    contrast = _when(n, p, draws, (draws.normal(n) * 0.5 * ln2).exp(), 1)
    matrix = _diagonal(contrast, contrast, contrast) @ matrix
    flip = _when(n, p, draws, draws.uniform(n).mul(2).floor(), 0)[:, None, None]
    matrix = (eye - 2 * grey * flip) @ matrix
    hue = _when(n, p, draws, draws.uniform(n) * 2 * pi - pi, 0)[:, None, None]
    u = 1 / math.sqrt(3)
    cross = torch.zeros(4, 4, device=device)
    cross[:3, :3] = torch.tensor([[0, -u, u], [u, 0, -u], [-u, u, 0]])
    spatial = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], device=device))
    # Rodrigues' formula about the luma axis; the last row remains (0, 0, 0, 1)
    rotation = grey + hue.cos() * (spatial - grey) + hue.sin() * cross + (eye - spatial)
    matrix = rotation @ matrix
    saturation = _when(n, p, draws, (draws.normal(n) * ln2).exp(), 1)[:, None, None]
    return (grey + (eye - grey) * saturation + (eye - spatial) * (1 - saturation)) @ matrix


def _recolour(images: Tensor, matrix: Tensor) -> Tensor:
    if images.shape[1] == 3:
        flat = matrix[:, :3, :3].to(images.dtype) @ images.flatten(2) + matrix[:, :3, 3:].to(images.dtype)
        return flat.view_as(images)
    mean = matrix[:, :3].mean(1).to(images.dtype)  # (B, 4): the map's average effect on a grey value
    return images * mean[:, :3].sum(1).view(-1, 1, 1, 1) + mean[:, 3].view(-1, 1, 1, 1)


def _diagonal(*scales: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([*scales, torch.ones_like(scales[0])], -1))


def _translation(shift: Tensor) -> Tensor:
    matrix = torch.eye(3, device=shift.device).repeat(len(shift), 1, 1)
    matrix[:, :2, 2] = shift
    return matrix


def _rotation(angle: Tensor) -> Tensor:
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 1, 0] = angle.sin()
    matrix[:, 0, 1] = -angle.sin()
    return matrix

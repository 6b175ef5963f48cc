"""Wide 3x3 convolutions with a stride of two, those of map2style, in training on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops._dispatch import is_batched, is_captured
from psp_lightning.ops.product import has_onednn, product

WIDE = 1 << 20  # weights; below that a convolution's own cost is arithmetic
PIXELS = 2048  # of the result, that are multiplied at a time: their neighbourhoods take 38 MB of 512 channels


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias, stride=2, padding=1)`; trained on the CPU as a matrix product, where that is faster.

    oneDNN's convolution reorders the weights three times a step, and its weight gradient is slow with a stride of two.

    Args:
        x: (B, I, H, W) float.
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (B, O, ceil(H / 2), ceil(W / 2)) in autocast's dtype or x's.
    """
    trained = torch.is_grad_enabled() and weight.requires_grad and weight.numel() >= WIDE
    if x.device.type != "cpu" or x.ndim != 4 or not trained or is_captured():
        return F.conv2d(x, weight, bias, 2, 1)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    pixels = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    if not (autocast or x.dtype == weight.dtype == bias.dtype) or not 0 < pixels <= _most_pixels(dtype):
        return F.conv2d(x, weight, bias, 2, 1)
    with torch.autocast("cpu", enabled=False):
        return _MatrixConv.apply(x.to(dtype), weight, bias)  # type: ignore[no-any-return]


def _most_pixels(dtype: torch.dtype) -> float:
    """Pixels of the result up to which the product was measured to be faster."""
    if dtype == torch.float32:
        return float("inf") if has_onednn() else 64
    return 512 if dtype == torch.bfloat16 else 0


class _MatrixConv(torch.autograd.Function):
    """The product of the pixels' neighbourhoods with the weights, which need no reordering where they are
    channels_last. Weights are cast to x's dtype, in the backward pass again: copies of all would take memory."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        size = (batch, len(weight), (height + 1) // 2, (width + 1) // 2)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        matrix = _matrix(weight).to(x.dtype).t()
        for some in _few(x):
            pixels = y[some].permute(0, 2, 3, 1)
            pixels.copy_(product(_neighbourhoods(x[some]), matrix).view_as(pixels)).add_(bias.to(x.dtype))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        if is_batched(dy):
            settings = ([len(weight)], (2, 2), (1, 1), (1, 1), False, (0, 0), 1)
            found = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *settings, need)
            return tuple(t if t is None or i == 0 else t.to(weight.dtype) for i, t in enumerate(found))
        matrix = _matrix(weight).to(x.dtype)
        dx, dw, db = [], None, None
        with torch.autocast(dy.device.type, enabled=False):
            for some in _few(x):
                rows = dy[some].permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
                if need[0]:
                    dx.append(_scatter(product(rows, matrix), x[some]))
                if need[1]:
                    part = product(rows.t(), _neighbourhoods(x[some]))
                    dw = part if dw is None else dw + part
            if need[2]:
                db = dy.sum((0, 2, 3)).to(weight.dtype)
        if dw is not None:
            dw = dw.to(weight.dtype).view(len(dw), 3, 3, -1).permute(0, 3, 1, 2)
        return torch.cat(dx) if len(dx) > 1 else dx[0] if dx else None, dw, db


def _few(x: Tensor) -> list[slice]:
    """Images of x, as many at a time as have `PIXELS` pixels, or one."""
    step = max(1, PIXELS // (((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)))
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _neighbourhoods(x: Tensor) -> Tensor:
    """(B, C, H, W) to (pixels of the result, 9 * C)."""
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
    windows = padded.unfold(1, 3, 2).unfold(2, 3, 2)  # (B, H', W', C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1]).contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) to (O, 9 * I)."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _scatter(d: Tensor, x: Tensor) -> Tensor:
    """The adjoint of `_neighbourhoods`: back to the shape of x."""
    batch, channels, height, width = x.shape
    d = d.view(batch, (height + 1) // 2, (width + 1) // 2, 3, 3, channels)
    padded = d.new_zeros(batch, height + 3, width + 3, channels)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + 2 * d.shape[1] : 2, j : j + 2 * d.shape[2] : 2] += d[:, :, :, i, j]
    cut = padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)
    return cut.contiguous(memory_format=torch.channels_last)

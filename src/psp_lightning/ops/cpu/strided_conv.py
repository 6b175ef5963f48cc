"""Wide 3x3 convolutions with a stride of two, as in map2style, for training on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cpu.product import has_onednn, product
from psp_lightning.ops.dispatch import is_batched, is_captured

WIDE = 1 << 20  # number of weights below which arithmetic dominates the cost of a convolution
PIXELS = 2048  # of the result per product; with 512 channels their neighbourhoods take 38 MB


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `F.conv2d(x, weight, bias, stride=2, padding=1)` for x (B, I, H, W), weight (O, I, 3, 3) and bias (O,).

    In training on the CPU it is computed as a matrix product if that is faster: oneDNN's convolution reorders the
    weights three times per step, and its weight gradient is slow with a stride of two. The result,
    (B, O, ceil(H / 2), ceil(W / 2)), has the dtype of autocast or x.
    """
    if not _product_pays(x, weight, bias):
        return F.conv2d(x, weight, bias, 2, 1)
    dtype = _dtype(x)
    with torch.autocast("cpu", enabled=False):
        return _MatrixConv.apply(x.to(dtype), weight, bias)  # type: ignore[no-any-return]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _product_pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether the product is possible, and was faster in measurements."""
    trained = torch.is_grad_enabled() and weight.requires_grad and weight.numel() >= WIDE
    if x.device.type != "cpu" or x.ndim != 4 or not trained or is_captured():
        return False
    alike = torch.is_autocast_enabled("cpu") or x.dtype == weight.dtype == bias.dtype
    pixels = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    return alike and 0 < pixels <= _most_pixels(_dtype(x))


def _most_pixels(dtype: torch.dtype) -> float:
    """Return the number of pixels of the result up to which the product was faster in measurements."""
    if dtype == torch.float32:
        return float("inf") if has_onednn() else 64
    return 512 if dtype == torch.bfloat16 else 0


class _MatrixConv(torch.autograd.Function):
    """The product of the pixels' neighbourhoods and the weight, which needs no reordering if it is channels_last.

    The weight is cast to the dtype of x, and again in the backward pass, because keeping the copies would take memory.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = [(side + 1) // 2 for side in x.shape[2:]]
        matrix, bias = _matrix(weight, x.dtype).t(), bias.to(x.dtype)
        rows = [product(_neighbourhoods(x[chunk]), matrix, bias) for chunk in _chunks(x)]
        return _as_images(_cat(rows), (len(x), *size))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        if is_batched(dy):
            return _convolution_backward(dy, x, weight, ctx.needs_input_grad)
        dx: list[Tensor] = []
        dw: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            for chunk in _chunks(x):
                rows = dy[chunk].permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
                if need_x:
                    dx.append(_scatter(product(rows, _matrix(weight, x.dtype)), x[chunk]))
                if need_weight:
                    dw = product(rows.t(), _neighbourhoods(x[chunk]), dw)
            if dw is not None:
                dw = dw.to(weight.dtype).view(len(dw), 3, 3, -1).permute(0, 3, 1, 2)
            db = dy.sum((0, 2, 3)).to(weight.dtype) if need_bias else None
        return _cat(dx) if dx else None, dw, db


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    settings = ([len(weight)], (2, 2), (1, 1), (1, 1), False, (0, 0), 1)
    dx, dw, db = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *settings, need)
    return dx, *[None if t is None else t.to(weight.dtype) for t in (dw, db)]


def _as_images(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return (B * H * W, C) as (B, C, H, W) in the same memory, but not as a view, so it may be changed in place."""
    batch, height, width = size
    channels = rows.shape[1]
    strides = (height * width * channels, 1, width * channels, channels)
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, (batch, channels, height, width), strides)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _chunks(x: Tensor) -> list[slice]:
    """Return slices of the batch with at most `PIXELS` pixels of the result each, but at least one image."""
    step = max(1, PIXELS // (((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)))
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _neighbourhoods(x: Tensor) -> Tensor:
    """Map (B, C, H, W) to (pixels of the result, 9 * C)."""
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
    windows = padded.unfold(1, 3, 2).unfold(2, 3, 2)  # (B, H', W', C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1]).contiguous()


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Map (O, I, 3, 3) to (O, 9 * I)."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1).to(dtype)


def _scatter(d: Tensor, x: Tensor) -> Tensor:
    """Map (pixels of the result, 9 * C) to the shape of x: the adjoint of `_neighbourhoods`."""
    batch, channels, height, width = x.shape
    d = d.view(batch, (height + 1) // 2, (width + 1) // 2, 3, 3, channels)
    padded = d.new_zeros(batch, height + 3, width + 3, channels)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + 2 * d.shape[1] : 2, j : j + 2 * d.shape[2] : 2] += d[:, :, :, i, j]
    cut = padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)
    return cut.contiguous(memory_format=torch.channels_last)

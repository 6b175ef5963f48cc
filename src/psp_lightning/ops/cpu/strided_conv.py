"""Wide 3x3 convolutions with a stride of two, those of map2style, in training on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cpu.product import has_onednn, product
from psp_lightning.ops.dispatch import is_batched, is_captured

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
    return strided_convs(x, [weight], [bias])[0]


def strided_convs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """`strided_conv` of one x with several weights; as products they share the copies of x that they take, and are one
    node of autograd's graph."""
    if not weights or not all(product_pays(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)):
        return [F.conv2d(x, weight, bias, 2, 1) for weight, bias in zip(weights, biases, strict=True)]
    dtype = _dtype(x)
    with torch.autocast("cpu", enabled=False):
        return list(_MatrixConv.apply(x.to(dtype), *weights, *biases))


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def product_pays(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `strided_conv` is a product: possible, and measured to be faster."""
    trained = torch.is_grad_enabled() and weight.requires_grad and weight.numel() >= WIDE
    if x.device.type != "cpu" or x.ndim != 4 or not trained or is_captured():
        return False
    alike = torch.is_autocast_enabled("cpu") or x.dtype == weight.dtype == bias.dtype
    pixels = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    return alike and 0 < pixels <= _most_pixels(_dtype(x))


def _most_pixels(dtype: torch.dtype) -> float:
    """Pixels of the result up to which the product was measured to be faster."""
    if dtype == torch.float32:
        return float("inf") if has_onednn() else 64
    return 512 if dtype == torch.bfloat16 else 0


class _MatrixConv(torch.autograd.Function):
    """The products of the pixels' neighbourhoods with each weight, which need no reordering where they are
    channels_last. Weights are cast to x's dtype, in the backward pass again: copies of all would take memory."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        n, size = len(parameters) // 2, [(side + 1) // 2 for side in x.shape[2:]]
        found: list[list[Tensor]] = [[] for _ in range(n)]
        for some in _few(x):
            near = _neighbourhoods(x[some])
            for weight, bias, rows in zip(parameters[:n], parameters[n:], found, strict=True):
                rows.append(product(near, _matrix(weight, x.dtype).t(), bias.to(x.dtype)))
        return tuple(_as_images(_cat(rows), (len(x), *size)) for rows in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: 1 + len(inputs) // 2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        n, need = len(weights), ctx.needs_input_grad
        dys = [(i, dy) for i, dy in enumerate(given) if dy is not None]
        dx: list[Tensor] = []
        dw: list[Tensor | None] = [None] * n
        db: list[Tensor | None] = [None] * n
        if any(is_batched(dy) for _, dy in dys):
            for i, dy in dys:
                part, dw[i], db[i] = _convolution_backward(dy, x, weights[i], (need[0], need[1 + i], need[1 + n + i]))
                dx += [] if part is None else [part]
            return sum(dx[1:], dx[0]) if dx else None, *dw, *db
        with torch.autocast(x.device.type, enabled=False):
            for some in _few(x) if dys else []:
                near, d_near = None, None
                for i, dy in dys:
                    rows = dy[some].permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
                    if need[0]:
                        d_near = product(rows, _matrix(weights[i], x.dtype), d_near)
                    if need[1 + i]:
                        near = _neighbourhoods(x[some]) if near is None else near
                        dw[i] = product(rows.t(), near, dw[i])
                if d_near is not None:
                    dx.append(_scatter(d_near, x[some]))
            for i, dy in dys:
                db[i] = dy.sum((0, 2, 3)).to(weights[i].dtype) if need[1 + n + i] else None
        for i, d in enumerate(dw):
            if d is not None:
                dw[i] = d.to(weights[i].dtype).view(len(d), 3, 3, -1).permute(0, 3, 1, 2)
        return _cat(dx) if dx else None, *dw, *db


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, ...]) -> list[Tensor | None]:
    settings = ([len(weight)], (2, 2), (1, 1), (1, 1), False, (0, 0), 1)
    dx, *others = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), *settings, need)
    return [dx, *[None if t is None else t.to(weight.dtype) for t in others]]


def _as_images(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B * H * W, C) as (B, C, H, W) on the same memory, yet no view, which could not be changed in place."""
    batch, height, width = size
    channels = rows.shape[1]
    strides = (height * width * channels, 1, width * channels, channels)
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, (batch, channels, height, width), strides)


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _few(x: Tensor) -> list[slice]:
    """Images of x, as many at a time as have `PIXELS` pixels, or one."""
    step = max(1, PIXELS // (((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)))
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _neighbourhoods(x: Tensor) -> Tensor:
    """(B, C, H, W) to (pixels of the result, 9 * C)."""
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
    windows = padded.unfold(1, 3, 2).unfold(2, 3, 2)  # (B, H', W', C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1]).contiguous()


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I, 3, 3) to (O, 9 * I)."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1).to(dtype)


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

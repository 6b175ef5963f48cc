"""Styled layers with constant weights on the CPU: few passes over memory, and one tensor kept for the backward pass.

A layer gives `y = gain * lrelu(demod * filter(conv(x * style)) + noise + bias)`. Composed of separate operators it
keeps five tensors of the size of y for its derivative. With constant weights y and x are enough: y has the sign of the
activation, and `demod * filter(conv(...))`, which the derivative of `demod` sums up, is y without activation, noise and
bias. x is the y of the layer before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cpu.slices import slices
from psp_lightning.ops.cpu.winograd import winograd_conv
from psp_lightning.ops.dispatch import is_batched
from psp_lightning.ops.modulated_conv import demodulation
from psp_lightning.ops.upfirdn2d import adjoint_padding, upfirdn2d_ref


def frozen_styled_conv(
    x: Tensor,
    style: Tensor,
    weight: Tensor,
    weight_sq_sum: Tensor,
    noise: Tensor,
    bias: Tensor,
    fir: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    negative_slope: float = 0.2,
    gain: float = 2**0.5,
    winograd_weight: Tensor | None = None,
) -> Tensor:
    """Compute a whole styled layer; only x and style have derivatives, of any order.

    Args:
        x: (B, I, H, W) float.
        style: (B, I) float32 or wider, scale of each input channel, including the equalised learning rate.
        weight: (O, I, k, k) in x's dtype; with `fir` the weight of a transposed convolution, (I, O, k, k).
        weight_sq_sum: (O, I) in style's dtype, squared weights summed over the taps.
        noise: (1 or B, 1, H', W'), multiplied by its strength.
        bias: (O,).
        fir: low-pass filter after a transposed convolution of stride two; None: an ordinary convolution.
        padding: padding of the filter.
        negative_slope: slope of the leaky ReLU below zero, positive.
        gain: factor after the activation, positive.
        winograd_weight: `winograd_weight(weight)`, with which an ordinary convolution is computed by `winograd_conv`.

    Returns:
        (B, O, H, W), or (B, O, 2H, 2W) with `fir` and its padding; in x's dtype.

    Source: StyleGAN2 (arXiv:1912.04958), figure 2, section 2.2, equations 1 and 3, appendix B.
    """
    arguments = (x, style, weight, weight_sq_sum, noise, bias, fir, winograd_weight, padding, negative_slope, gain)
    if torch.is_grad_enabled() and (x.requires_grad or style.requires_grad):
        return _FrozenStyledConv.apply(*arguments)  # type: ignore[no-any-return]
    return _forward(*arguments)


def _convolve(
    x: Tensor,
    style: Tensor,
    weight: Tensor,
    weight_sq_sum: Tensor,
    fir: Tensor | None,
    padding: tuple[int, int],
    winograd_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the filtered convolution, and the factors that demodulate it."""
    x = x * style[:, :, None, None].to(x.dtype)
    if winograd_weight is not None:
        x = winograd_conv(x, winograd_weight)
    elif fir is None:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    else:
        x = upfirdn2d_ref(F.conv_transpose2d(x, weight, stride=2), fir, padding=(*padding, *padding))
    return x, demodulation(weight_sq_sum, style)


def _forward(
    x: Tensor, style: Tensor, weight: Tensor, weight_sq_sum: Tensor, noise: Tensor, bias: Tensor, fir: Tensor | None,
    winograd_weight: Tensor | None, padding: tuple[int, int], negative_slope: float, gain: float,
) -> Tensor:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        y, demod = _convolve(x, style, weight, weight_sq_sum, fir, padding, winograd_weight)
        # The gain commutes with the leaky ReLU: on the factors it costs nothing. In place, because fresh memory costs
        # more than the arithmetic.
        factor, noise, bias = (demod * gain)[:, :, None, None], noise * gain, (bias * gain)[:, None, None]
        factor, noise, bias = (t.to(y.dtype) for t in (factor, noise, bias))
        for rows in slices(y):
            F.leaky_relu_(y[rows].mul_(factor).add_(noise[rows]).add_(bias), negative_slope)
        return y


class _FrozenStyledConv(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, padding, negative_slope, gain = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.settings = (padding, negative_slope, gain)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            step = _composed if torch.is_grad_enabled() else _gradients
            return (*step(ctx.saved_tensors, ctx.settings, dy, ctx.needs_input_grad), *[None] * 9)


def _gradients(saved: Any, settings: Any, dy: Tensor, need: Any) -> tuple[Tensor | None, Tensor | None]:
    x, style, weight, weight_sq_sum, noise, bias, fir, winograd_weight, y = saved
    padding, slope, gain = settings
    demod = demodulation(weight_sq_sum, style)
    du, sums = _before_activation(dy, y, noise * gain, bias * gain, demod * gain, slope, need[1])
    if winograd_weight is not None and not is_batched(dy):
        dx = winograd_conv(du, winograd_weight, adjoint=True)
    elif fir is None:
        dx = F.conv_transpose2d(du, weight, padding=weight.shape[-1] // 2)
    else:
        size = [2 * (side - 1) + weight.shape[-1] for side in x.shape[2:]]
        adjoint = adjoint_padding(size, dy.shape[2:], (1, 1), (1, 1), (*padding, *padding), fir.shape)
        du = upfirdn2d_ref(du, fir, padding=adjoint, flip=True)
        dx = F.conv2d(du, weight, stride=2)
    del du
    d_style = None if sums is None else -(sums * demod.square()) @ weight_sq_sum * style
    factor = style[:, :, None, None].to(dx.dtype)
    if is_batched(dy):
        if d_style is not None:
            d_style = d_style + (dx.to(style.dtype) * x).sum((2, 3))
        return dx * factor if need[0] else None, d_style
    for rows in slices(dx):
        if d_style is not None:
            d_style += (dx[rows].to(style.dtype) * x[rows]).sum((2, 3))
        dx[rows].mul_(factor)
    return dx if need[0] else None, d_style


def _before_activation(
    dy: Tensor, y: Tensor, noise: Tensor, bias: Tensor, factor: Tensor, slope: float, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient before the demodulation, and (B, C) sums over pixels for the gradient of the demodulation.

    These are sums of du * gain * demod * conv, where du is the gradient before gain and activation: du times the
    argument of the activation, which is dy * y, less noise and bias. It works slice by slice: what lies between two
    passes stays in the cache of the processor, and half precision is widened there.
    """
    wide = factor.dtype
    factor = factor[:, :, None, None]
    if is_batched(dy):
        d, v, noise, bias = (t.to(wide) for t in (dy, y, noise, bias))
        before = torch.ops.aten.leaky_relu_backward(d, v, slope, True)
        total = (d * v - before * noise).sum((2, 3)) - before.sum((2, 3)) * bias
        return (before * factor).to(y.dtype), total if with_sums else None
    du = torch.empty_like(y)
    sums = dy.new_zeros(y.shape[:2], dtype=wide) if with_sums else None
    for rows in slices(y):
        d, v = dy[rows].to(wide), y[rows].to(wide)
        before = torch.ops.aten.leaky_relu_backward(d, v, slope, True)
        if sums is not None:
            total = before.sum((2, 3))
            sums += (d * v).sum((2, 3)) - total * bias.to(wide)
            sums -= (before * noise[rows].to(wide)).sum((2, 3))
        if du.dtype == wide:
            torch.mul(before, factor, out=du[rows])
        else:  # `out` of another type is far slower
            du[rows].copy_(before.mul_(factor))
    return du, sums


def _composed(saved: Any, settings: Any, dy: Tensor, need: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the same, composed of operators that have a derivative again."""
    x, style, weight, weight_sq_sum, noise, bias, fir, *_ = saved
    padding, slope, gain = settings
    y, demod = _convolve(x, style, weight, weight_sq_sum, fir, padding)
    y = y * demod[:, :, None, None].to(y.dtype) + noise.to(y.dtype) + bias[:, None, None].to(y.dtype)
    y = F.leaky_relu(y, slope) * gain
    wanted = [t for t, needed in zip((x, style), need[:2], strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return next(found) if need[0] else None, next(found) if need[1] else None


def frozen_to_rgb(x: Tensor, style: Tensor, weight: Tensor) -> Tensor:
    """Convolve 1x1 without demodulation, with the style on the few weights and not on the many activations.

    Args:
        x: (B, I, H, W) float.
        style: (B, I).
        weight: (O, I, 1, 1).

    Returns:
        (B, O, H, W) in x's dtype and memory order.
    """
    weight = (weight[:, :, 0, 0] * style[:, None]).to(x.dtype)  # (B, O, I)
    with torch.autocast(x.device.type, enabled=False):
        if x.is_contiguous():
            return torch.bmm(weight, x.flatten(2)).unflatten(2, x.shape[2:])
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, I)
        wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        rows = _RowProduct.apply(rows, weight) if wanted else torch.bmm(rows, weight.transpose(1, 2))  # (B, HW, O)
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class _RowProduct(torch.autograd.Function):
    """`rows @ weight^T` of batches; the gradient of the weight is the product that is fast for three long columns."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(rows, weight.transpose(1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            d_rows = torch.bmm(dy, weight) if ctx.needs_input_grad[0] else None
            d_weight = torch.bmm(dy.transpose(1, 2), rows) if ctx.needs_input_grad[1] else None
        return d_rows, d_weight

"""Styled layers with constant weights on the CPU: few passes over memory, and one tensor kept for the backward pass.

A layer computes `y = gain * lrelu(demod * fir(conv(x * style)) + noise + bias)`. As separate operators, it keeps five
tensors of the size of y for its derivative. With constant weights, y and x are enough. y has the sign of the
activation. The derivative of `demod` sums `demod * fir(conv(...))`, which is y without activation, noise and bias. x is
the y of the previous layer.
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

SLOPE, GAIN = 0.2, 2**0.5  # of the activation


def frozen_styled_conv(
    x: Tensor,
    style: Tensor,
    weight: Tensor,
    weight_sq_sum: Tensor,
    noise: Tensor,
    bias: Tensor,
    fir: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    winograd_weight: Tensor | None = None,
) -> Tensor:
    """Compute a styled layer; only x and style have derivatives, of any order.

    Args:
        x: (B, I, H, W) float.
        style: (B, I) float32 or wider, scale of each input channel, including the equalised learning rate.
        weight: (O, I, k, k) in the dtype of x; with `fir` the weight of a transposed convolution, (I, O, k, k).
        weight_sq_sum: (O, I) in the dtype of style, squared weights summed over the kernel.
        noise: (1 or B, 1, H', W'), multiplied by its strength.
        bias: (O,).
        fir: FIR filter after a transposed convolution of stride two; None: an ordinary convolution.
        padding: padding of the FIR filter, before and after.
        winograd_weight: `winograd_weight(weight)`; if given, `winograd_conv` computes the ordinary convolution.

    Returns:
        (B, O, H, W), or (B, O, 2H, 2W) with `fir` and its padding, in the dtype of x.

    Source: StyleGAN2 (arXiv:1912.04958), figure 2, section 2.2, equations 1 and 3, appendix B.
    """
    arguments = (x, style, weight, weight_sq_sum, noise, bias, fir, winograd_weight, padding)
    if torch.is_grad_enabled() and (x.requires_grad or style.requires_grad):
        return _FrozenStyledConv.apply(*arguments)  # type: ignore[no-any-return]
    return _forward(*arguments)


def _convolve(
    x: Tensor, style: Tensor, weight: Tensor, weight_sq_sum: Tensor, fir: Tensor | None, padding: tuple[int, int],
    winograd_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the convolution after the FIR filter, and its demodulation factors."""
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
    winograd_weight: Tensor | None, padding: tuple[int, int],
) -> Tensor:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        y, demod = _convolve(x, style, weight, weight_sq_sum, fir, padding, winograd_weight)
        # The gain commutes with the leaky ReLU and costs nothing on the factors. The operations are in place, because
        # new memory costs more than the arithmetic.
        factor, noise, bias = (demod * GAIN)[:, :, None, None], noise * GAIN, (bias * GAIN)[:, None, None]
        factor, noise, bias = (t.to(y.dtype) for t in (factor, noise, bias))
        for rows in slices(y):
            F.leaky_relu_(y[rows].mul_(factor).add_(noise[rows]).add_(bias), SLOPE)
        return y


class _FrozenStyledConv(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.padding = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            gradients = _composed if torch.is_grad_enabled() else _fused
            return (*gradients(ctx.saved_tensors, ctx.padding, dy, ctx.needs_input_grad), *[None] * 7)


def _fused(saved: Any, padding: tuple[int, int], dy: Tensor, need: Any) -> tuple[Tensor | None, Tensor | None]:
    x, style, weight, weight_sq_sum, noise, bias, fir, winograd_weight, y = saved
    demod = demodulation(weight_sq_sum, style)
    du, sums = _before_activation(dy, y, noise * GAIN, bias * GAIN, demod * GAIN, need[1])
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
    dy: Tensor, y: Tensor, noise: Tensor, bias: Tensor, factor: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient before the demodulation, and sums over pixels (B, C) for the gradient of the demodulation.

    The sums add up du * gain * demod * conv, where du is the gradient before gain and activation. Each term is du times
    the argument of the activation (dy * y), minus noise and bias. The slices keep intermediate values in the
    processor's cache, where half precision is widened.
    """
    wide = factor.dtype
    factor = factor[:, :, None, None]
    if is_batched(dy):
        d, v, noise, bias = (t.to(wide) for t in (dy, y, noise, bias))
        before = torch.ops.aten.leaky_relu_backward(d, v, SLOPE, True)
        total = (d * v - before * noise).sum((2, 3)) - before.sum((2, 3)) * bias
        return (before * factor).to(y.dtype), total if with_sums else None
    du = torch.empty_like(y)
    sums = dy.new_zeros(y.shape[:2], dtype=wide) if with_sums else None
    for rows in slices(y):
        d, v = dy[rows].to(wide), y[rows].to(wide)
        before = torch.ops.aten.leaky_relu_backward(d, v, SLOPE, True)
        if sums is not None:
            total = before.sum((2, 3))
            sums += (d * v).sum((2, 3)) - total * bias.to(wide)
            sums -= (before * noise[rows].to(wide)).sum((2, 3))
        if du.dtype == wide:
            torch.mul(before, factor, out=du[rows])
        else:  # `out` with another dtype is far slower
            du[rows].copy_(before.mul_(factor))
    return du, sums


def _composed(saved: Any, padding: tuple[int, int], dy: Tensor, need: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients as a composition of differentiable operators."""
    x, style, weight, weight_sq_sum, noise, bias, fir, *_ = saved
    y, demod = _convolve(x, style, weight, weight_sq_sum, fir, padding)
    y = y * demod[:, :, None, None].to(y.dtype) + noise.to(y.dtype) + bias[:, None, None].to(y.dtype)
    y = F.leaky_relu(y, SLOPE) * GAIN
    wanted = [t for t, needed in zip((x, style), need[:2], strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return next(found) if need[0] else None, next(found) if need[1] else None


def frozen_to_rgb(x: Tensor, style: Tensor, weight: Tensor) -> Tensor:
    """Convolve x (B, I, H, W) with weight (O, I, 1, 1), modulated by style (B, I), without demodulation.

    The style scales the few weights instead of the many activations. The result has the dtype and memory layout of x.
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
    """Batched `rows @ weight^T`; the weight gradient uses the product that is fast for three long columns."""

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

"""Styled layers whose weights are constant, on the CPU: few passes over memory, one tensor kept for the backward pass.

A layer gives `y = gain * lrelu(demod * filter(conv(x * style)) + noise + bias)`. Composed of separate operators it
keeps five tensors of the size of y for its derivative. With constant weights y and x are enough: the sign of the
activation is y's, and what the derivative of `demod` sums up, `demod * filter(conv(...))`, is y without activation,
noise and bias. x is the y of the layer before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cpu.slices import slices
from psp_lightning.ops.cpu.winograd import winograd_conv
from psp_lightning.ops.dispatch import is_batched
from psp_lightning.ops.modulated_conv import demodulation_from_energy
from psp_lightning.ops.upfirdn2d import adjoint_padding, upfirdn2d_ref


def frozen_styled_conv(
    x: Tensor,
    style: Tensor,
    weight: Tensor,
    energy: Tensor,
    noise: Tensor,
    bias: Tensor,
    blur: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    negative_slope: float = 0.2,
    gain: float = 2**0.5,
    fast: Tensor | None = None,
) -> Tensor:
    """A whole styled layer; differentiable, to any order, by x and style alone.

    Args:
        x: (B, I, H, W) float.
        style: (B, I) float32 or wider, scale of each input channel, the equalised learning rate included.
        weight: in x's dtype, (O, I, k, k), or with `blur` that of a transposed convolution, (I, O, k, k).
        energy: (O, I) in style's dtype, sums over the taps of the squared weights.
        noise: (1 or B, 1, H', W'), multiplied by its strength.
        bias: (O,).
        blur: low-pass filter behind a transposed convolution of stride two; None: an ordinary convolution.
        padding: of the filter.
        negative_slope: of the leaky ReLU, above zero.
        gain: factor behind the activation, above zero.
        fast: `winograd_weight(weight)`, with which an ordinary convolution is `winograd_conv`; not used with `blur`.

    Returns:
        (B, O, H, W), or (B, O, 2H, 2W) with `blur` and its padding; in x's dtype.

    Source: StyleGAN2 (arXiv:1912.04958), figure 2, section 2.2, equations 1 and 3, appendix B.
    """
    fast = fast if blur is None else None
    arguments = (x, style, weight, energy, noise, bias, blur, fast, padding, negative_slope, gain)
    if torch.is_grad_enabled() and (x.requires_grad or style.requires_grad):
        return _FrozenStyledConv.apply(*arguments)  # type: ignore[no-any-return]
    return _forward(*arguments)


def _convolve(
    x: Tensor,
    style: Tensor,
    weight: Tensor,
    energy: Tensor,
    blur: Tensor | None,
    padding: tuple[int, int],
    fast: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The filtered convolution, and the factors that demodulate it."""
    x = x * style[:, :, None, None].to(x.dtype)
    if fast is not None:
        x = winograd_conv(x, fast)
    elif blur is None:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    else:
        x = upfirdn2d_ref(F.conv_transpose2d(x, weight, stride=2), blur, padding=(*padding, *padding))
    return x, demodulation_from_energy(energy, style)


def _forward(
    x: Tensor, style: Tensor, weight: Tensor, energy: Tensor, noise: Tensor, bias: Tensor, blur: Tensor | None,
    fast: Tensor | None, padding: tuple[int, int], negative_slope: float, gain: float,
) -> Tensor:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        y, demod = _convolve(x, style, weight, energy, blur, padding, fast)
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
    x, style, weight, energy, noise, bias, blur, fast, y = saved
    padding, slope, gain = settings
    demod = demodulation_from_energy(energy, style)
    du, sums = _before_activation(dy, y, noise * gain, bias * gain, demod * gain, slope, need[1])
    if fast is not None and not is_batched(dy):
        dx = winograd_conv(du, fast, adjoint=True)
    elif blur is None:
        dx = F.conv_transpose2d(du, weight, padding=weight.shape[-1] // 2)
    else:
        size = [2 * (side - 1) + weight.shape[-1] for side in x.shape[2:]]
        adjoint = adjoint_padding(size, dy.shape[2:], (1, 1), (1, 1), (*padding, *padding), blur.shape)
        du = upfirdn2d_ref(du, blur, padding=adjoint, flip=True)
        dx = F.conv2d(du, weight, stride=2)
    del du
    d_style = None if sums is None else -(sums * demod.square()) @ energy * style
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
    """The gradient in front of the demodulation, and (B, C) sums over pixels for the demodulation's own.

    These are sums of du * gain * demod * conv, where du is the gradient in front of gain and activation: of du times
    the activation's argument, which is dy * y, less noise and bias. Slice by slice: what lies between two passes stays
    in the processor's cache, and half precision is widened there.
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
    """The same of operators that have a derivative again."""
    x, style, weight, energy, noise, bias, blur, *_ = saved
    padding, slope, gain = settings
    y, demod = _convolve(x, style, weight, energy, blur, padding)
    y = y * demod[:, :, None, None].to(y.dtype) + noise.to(y.dtype) + bias[:, None, None].to(y.dtype)
    y = F.leaky_relu(y, slope) * gain
    wanted = [t for t, needed in zip((x, style), need[:2], strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return next(found) if need[0] else None, next(found) if need[1] else None


def frozen_to_rgb(x: Tensor, style: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution without demodulation, the style on its few weights and not on the many activations.

    Args:
        x: (B, I, H, W) float.
        style: (B, I).
        weight: (O, I, 1, 1).

    Returns:
        (B, O, H, W) in x's dtype and order in memory.
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
    """`rows @ weight^T` of batches, whose gradient of the weight is the product that is fast for three long columns."""

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

"""The operators as torch.library knows them, so that torch.compile, torch.export and autocast can go past them.

Each has an implementation for CPU (plain PyTorch) and CUDA (the kernel, or plain PyTorch where it cannot be built), a
fake one (shapes and strides alone) and a derivative. The derivative is again made of these operators: any order exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from psp_lightning.ops.cuda import launch as _cuda
from psp_lightning.ops.dispatch import choice
from psp_lightning.ops.epilogue import act_backward_ref, epilogue_backward_ref, epilogue_ref
from psp_lightning.ops.upfirdn2d import adjoint_padding, output_size, upfirdn2d_ref

Ints = Sequence[int]


def register_op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares `psp_lightning::SCHEMA` and the decorated function as what it does on CPU and CUDA."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        name = "psp_lightning::" + schema.partition("(")[0]
        torch.library.define(name, "(" + schema.partition("(")[2], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, ("CPU", "CUDA"), function)
        return function

    return declare


def register_derivative(name: str, setup_context: Callable[..., None]) -> Callable[..., Any]:
    """Declares the decorated function as the backward of `psp_lightning::name`."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_autograd(f"psp_lightning::{name}", function, setup_context=setup_context)
        return function

    return declare


def _kernels(x: Tensor) -> Any:
    """The loaded kernels for a CUDA tensor, else None."""
    if not x.is_cuda:
        return None
    from psp_lightning.ops.cuda.build import kernels

    return None if choice() == "ref" else kernels()


def _filtered_shape(x: Tensor, filter: Tensor, up: Ints, down: Ints, padding: Ints) -> list[int]:
    sizes = [
        output_size(x.shape[2 + a], up[a], down[a], padding[2 * a], padding[2 * a + 1], filter.shape[a]) for a in (0, 1)
    ]
    return [x.shape[0], x.shape[1], *sizes]


# --- upfirdn2d: a linear map, whose adjoint is one of the same kind


@register_op(
    "upfirdn2d(Tensor x, Tensor filter, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip, float gain) -> Tensor"
)
def _upfirdn2d(x: Tensor, filter: Tensor, up: Ints, down: Ints, padding: Ints, flip: bool, gain: float) -> Tensor:
    shape = _filtered_shape(x, filter, up, down, padding)
    if kernels := _kernels(x):
        return _cuda.upfirdn2d(kernels, x, filter, up, down, padding, flip, gain, shape)
    return _cuda.ordered(upfirdn2d_ref(x, filter, up, down, padding, flip, gain), x)


@torch.library.register_fake("psp_lightning::upfirdn2d")
def _(x: Tensor, filter: Tensor, up: Ints, down: Ints, padding: Ints, flip: bool, gain: float) -> Tensor:
    return _cuda.empty(x, _filtered_shape(x, filter, up, down, padding))


def _save_upfirdn2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, filter, up, down, padding, flip, gain = inputs
    ctx.save_for_backward(filter)
    ctx.arguments = (up, down, flip, gain)
    ctx.padding = adjoint_padding(x.shape[2:], output.shape[2:], up, down, padding, filter.shape)


@register_derivative("upfirdn2d", _save_upfirdn2d)
def _upfirdn2d_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (filter,) = ctx.saved_tensors
    up, down, flip, gain = ctx.arguments
    dx = torch.ops.psp_lightning.upfirdn2d(dy, filter, down, up, ctx.padding, not flip, gain)
    return dx, None, None, None, None, None, None


# --- act_backward: du = dy * derivative of the activation, told from its result; linear in dy and its own adjoint


@register_op("act_backward(Tensor dy, Tensor y, float slope, float gain, float clamp) -> Tensor")
def _act_backward(dy: Tensor, y: Tensor, slope: float, gain: float, clamp: float) -> Tensor:
    if kernels := _kernels(y):
        return _cuda.epilogue_backward(kernels, dy, y, None, None, None, slope, gain, clamp, False)[0]
    return _cuda.ordered(act_backward_ref(dy, y, slope, gain, clamp), y)


@torch.library.register_fake("psp_lightning::act_backward")
def _(dy: Tensor, y: Tensor, slope: float, gain: float, clamp: float) -> Tensor:
    return _cuda.empty(y, y.shape)


def _save_act_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.arguments = inputs[2:]


@register_derivative("act_backward", _save_act_backward)
def _act_backward_backward(ctx: Any, ddu: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return torch.ops.psp_lightning.act_backward(ddu, y, *ctx.arguments), None, None, None, None


# --- epilogue: clamp(gain * lrelu(demod * filter(x) + strength * noise + bias))


@register_op(
    "epilogue(Tensor x, Tensor? blur, SymInt[] padding, Tensor? demod, Tensor? noise, Tensor? strength, Tensor? bias, "
    "float slope, float gain, float clamp) -> Tensor"
)
def _epilogue(
    x: Tensor, blur: Tensor | None, padding: Ints, demod: Tensor | None, noise: Tensor | None,
    strength: Tensor | None, bias: Tensor | None, slope: float, gain: float, clamp: float,
) -> Tensor:  # fmt: skip
    if kernels := _kernels(x):
        shape = x.shape if blur is None else _filtered_shape(x, blur, (1, 1), (1, 1), padding)
        return _cuda.epilogue(kernels, x, blur, padding, demod, noise, strength, bias, slope, gain, clamp, shape)
    y = x if blur is None else upfirdn2d_ref(x, blur, padding=padding)
    y = epilogue_ref(y, demod, noise, strength, bias, slope, gain, None if clamp < 0 else clamp)
    y = _cuda.ordered(y, x)
    return y.clone() if y is x else y  # an operator must not return its argument


@torch.library.register_fake("psp_lightning::epilogue")
def _(
    x: Tensor, blur: Tensor | None, padding: Ints, demod: Tensor | None, noise: Tensor | None,
    strength: Tensor | None, bias: Tensor | None, slope: float, gain: float, clamp: float,
) -> Tensor:  # fmt: skip
    return _cuda.empty(x, x.shape if blur is None else _filtered_shape(x, blur, (1, 1), (1, 1), padding))


@register_op(
    "epilogue_backward(Tensor dy, Tensor? y, Tensor? x, Tensor? demod, Tensor? noise, float slope, float gain, "
    "float clamp, bool sums) -> (Tensor, Tensor)"
)
def _epilogue_backward(
    dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    slope: float, gain: float, clamp: float, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if kernels := _kernels(dy):
        return _cuda.epilogue_backward(kernels, dy, y, x, demod, noise, slope, gain, clamp, sums)
    g, total = epilogue_backward_ref(dy, y, x, demod, noise, slope, gain, clamp)
    g = _cuda.ordered(g, dy if y is None else y)
    return g.clone() if g is dy else g, total if sums else total.new_empty(0)


@torch.library.register_fake("psp_lightning::epilogue_backward")
def _(
    dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    slope: float, gain: float, clamp: float, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = dy.new_empty((dy.shape[0], dy.shape[1], 3) if sums else (0,), dtype=wide)
    return _cuda.empty(dy if y is None else y, dy.shape), total


def _save_epilogue(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, blur, padding, demod, noise, strength, bias, slope, gain, clamp = inputs
    active = slope != 1 or gain != 1 or clamp >= 0
    needed = demod is not None and demod.requires_grad  # x is kept for this alone
    ctx.save_for_backward(x if needed else None, blur, demod, noise, strength, bias, output if active else None)
    ctx.padding, ctx.activation, ctx.has_bias = padding, (slope, gain, clamp), bias is not None
    if blur is not None:
        one = (1, 1)
        ctx.adjoint = adjoint_padding(x.shape[2:], output.shape[2:], one, one, padding, blur.shape)


@register_derivative("epilogue", _save_epilogue)
def _epilogue_derivative(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad  # x, blur, padding, demod, noise, strength, bias, ...
    # A gradient that is differentiated again is composed of operators that are; a gradient of the noise maps is rare.
    once = not torch.is_grad_enabled() and not need[4]
    dx, d_demod, d_noise, d_strength, d_bias = (_fused if once else _composed)(ctx, dy, need)
    return dx, None, None, d_demod, d_noise, d_strength, d_bias, None, None, None


def _fused(ctx: Any, dy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, blur, demod, noise, strength, bias, y = ctx.saved_tensors
    step = torch.ops.psp_lightning.epilogue_backward
    noise = noise if need[5] else None
    if blur is None:
        dx, sums = step(dy, y, x, demod, noise, *ctx.activation, need[3] or need[5] or need[6])
        d_demod = sums[..., 0] if need[3] else None
    else:
        du, sums = step(dy, y, None, None, noise, *ctx.activation, need[5] or need[6])
        dx = torch.ops.psp_lightning.upfirdn2d(du, blur, [1, 1], [1, 1], ctx.adjoint, True, 1.0)
        d_demod = None
        if demod is not None:  # sum of du * filter(x) = sum of adjoint filter(du) * x
            dx, more = step(dx, None, x, demod, None, 1.0, 1.0, -1.0, need[3])
            d_demod = more[..., 0] if need[3] else None
    d_strength = sums[..., 2].sum().to(strength.dtype).reshape(strength.shape) if need[5] else None
    d_bias = sums[..., 1].sum(0).to(bias.dtype) if need[6] else None
    return dx, None if d_demod is None else d_demod.to(demod.dtype), None, d_strength, d_bias


def _composed(ctx: Any, dy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, blur, demod, noise, strength, bias, y = ctx.saved_tensors
    du = dy if y is None else torch.ops.psp_lightning.act_backward(dy, y, *ctx.activation)
    dx = du if demod is None else du * demod[:, :, None, None].to(du.dtype)
    if blur is not None:
        dx = torch.ops.psp_lightning.upfirdn2d(dx, blur, [1, 1], [1, 1], ctx.adjoint, True, 1.0)
    du = du.to(torch.promote_types(du.dtype, torch.float32))  # sums over a whole map
    d_demod = d_noise = d_strength = d_bias = None
    if need[3]:
        t = x
        if blur is not None:
            t = torch.ops.psp_lightning.upfirdn2d(x, blur, [1, 1], [1, 1], ctx.padding, False, 1.0)
        d_demod = (du * t.to(du.dtype)).sum((2, 3)).to(demod.dtype)
    if need[4]:
        d_noise = (du.sum(1, keepdim=True) * strength).sum_to_size(noise.shape).to(noise.dtype)
    if need[5]:
        d_strength = (du * noise).sum().to(strength.dtype).reshape(strength.shape)
    if need[6]:
        d_bias = du.sum([0, *range(2, du.ndim)]).to(bias.dtype)
    return dx, d_demod, d_noise, d_strength, d_bias

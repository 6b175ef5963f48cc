"""The epilogue of a modulated convolution: FIR filter, demodulation, noise, bias, activation, clamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psp_lightning.ops.bias_act import bias_act_ref
from psp_lightning.ops.cuda import launch
from psp_lightning.ops.dispatch import kernels_for, register_op, use_op
from psp_lightning.ops.upfirdn2d import adjoint_padding, filtered_shape, upfirdn2d_ref


def modconv_epilogue(
    x: Tensor,
    fir: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    negative_slope: float = 0.2,
    gain: float = math.sqrt(2),
    clamp: float | None = None,
) -> Tensor:
    """Compute `clamp(gain * lrelu(demod * fir(x) + strength * noise + bias))`, on CUDA in one pass over memory.

    Args:
        x: (B, C, H, W) float, the result of the convolution.
        fir: (kh, kw) FIR filter after a transposed convolution, applied as in `upfirdn2d`; None: no filter.
        padding: padding of the filter, before and after.
        demod: (B, C) factor of each sample and channel; None: 1.
        noise: (1 or B, 1, H', W'); None: no noise.
        strength: (1,) factor of the noise, required with it.
        bias: (C,); None: 0.
        negative_slope: slope for negative values; 1 together with `gain=1` means no activation.
        gain: factor after the activation.
        clamp: bound of the absolute value of the result; None: no bound.

    Returns:
        (B, C, H', W') in the dtype of `x`, with H' = H if there is no filter. In half precision the CUDA kernel rounds
        once, at the end; plain PyTorch rounds after each step.

    Source: StyleGAN2 (arXiv:1912.04958), figure 2 and appendix B.
    """
    if noise is not None and strength is None:
        raise ValueError("modconv_epilogue: noise is given without its strength.")
    learned = fir is not None and fir.requires_grad
    if not learned and gain > 0 and negative_slope >= 0 and use_op(x):
        both = [] if fir is None else [*padding, *padding]
        bound = -1.0 if clamp is None else clamp
        return torch.ops.psp_lightning.epilogue(x, fir, both, demod, noise, strength, bias, negative_slope, gain, bound)
    if fir is not None:
        x = upfirdn2d_ref(x, fir, padding=(*padding, *padding))
    return epilogue_ref(x, demod, noise, strength, bias, negative_slope, gain, clamp)


def epilogue_ref(
    x: Tensor, demod: Tensor | None, noise: Tensor | None, strength: Tensor | None, bias: Tensor | None,
    negative_slope: float, gain: float, clamp: float | None,
) -> Tensor:  # fmt: skip
    """Compute the part of `modconv_epilogue` after the FIR filter, in plain PyTorch."""
    if demod is not None:
        x = x * demod[:, :, None, None].to(x.dtype)
    if noise is not None and strength is not None:
        x = x + (strength * noise).to(x.dtype)
    return bias_act_ref(x, None if bias is None else bias.to(x.dtype), negative_slope, gain, clamp)


def act_backward_ref(dy: Tensor, y: Tensor, negative_slope: float, gain: float, clamp: float) -> Tensor:
    """Return the gradient of gain, leaky ReLU and clamp (< 0: none) from their result `y`; it is linear in `dy`."""
    du = torch.where(y > 0, dy * gain, dy * (gain * negative_slope))
    # the bound in y's dtype, because y was clamped to that value
    return du if clamp < 0 else torch.where(y.abs() < torch.tensor(clamp, dtype=y.dtype), du, torch.zeros_like(du))


def epilogue_backward_ref(
    dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    negative_slope: float, gain: float, clamp: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the tensors for the gradient of an epilogue without FIR filter.

    Returns:
        `demod * du` (B, C, ...) in the dtype of `dy`, where `du` is the gradient before the activation; and the sums
        over pixels of `du * x`, `du` and `du * noise`, (B, C, 3) in float32 or wider.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    du = (dy if y is None else act_backward_ref(dy, y, negative_slope, gain, clamp)).to(wide)
    flat = du.flatten(2) if du.ndim > 2 else du[..., None]  # (B, C, P)
    none = flat.new_zeros(flat.shape[:2])
    with_x = none if x is None else (flat * x.to(wide).reshape(flat.shape)).sum(2)
    with_noise = none if noise is None else (flat * noise.to(wide).flatten(2)).sum(2)
    sums = torch.stack([with_x, flat.sum(2), with_noise], 2)
    g = du if demod is None else du * demod[:, :, None, None].to(wide)
    return g.to(dy.dtype), sums


# The registered operators.
# act_backward: du = dy * derivative of the activation, computed from its result; linear in dy, so it is its own adjoint


@register_op("act_backward(Tensor dy, Tensor y, float slope, float gain, float clamp) -> Tensor")
def _act_backward(dy: Tensor, y: Tensor, slope: float, gain: float, clamp: float) -> Tensor:
    if kernels := kernels_for(y):
        return launch.epilogue_backward(kernels, dy, y, None, None, None, slope, gain, clamp, False)[0]
    return launch.ordered(act_backward_ref(dy, y, slope, gain, clamp), y)


@torch.library.register_fake("psp_lightning::act_backward")
def _(dy: Tensor, y: Tensor, slope: float, gain: float, clamp: float) -> Tensor:
    return launch.empty(y, y.shape)


def _save_act_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.arguments = inputs[2:]


def _act_backward_backward(ctx: Any, ddu: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return torch.ops.psp_lightning.act_backward(ddu, y, *ctx.arguments), None, None, None, None


torch.library.register_autograd("psp_lightning::act_backward", _act_backward_backward, setup_context=_save_act_backward)

# epilogue: clamp(gain * lrelu(demod * fir(x) + strength * noise + bias))


@register_op(
    "epilogue(Tensor x, Tensor? fir, SymInt[] padding, Tensor? demod, Tensor? noise, Tensor? strength, Tensor? bias, "
    "float slope, float gain, float clamp) -> Tensor"
)
def _epilogue(
    x: Tensor, fir: Tensor | None, padding: Sequence[int], demod: Tensor | None, noise: Tensor | None,
    strength: Tensor | None, bias: Tensor | None, slope: float, gain: float, clamp: float,
) -> Tensor:  # fmt: skip
    if kernels := kernels_for(x):
        shape = x.shape if fir is None else filtered_shape(x, fir, padding)
        return launch.epilogue(kernels, x, fir, padding, demod, noise, strength, bias, slope, gain, clamp, shape)
    y = x if fir is None else upfirdn2d_ref(x, fir, padding=padding)
    y = epilogue_ref(y, demod, noise, strength, bias, slope, gain, None if clamp < 0 else clamp)
    y = launch.ordered(y, x)
    return y.clone() if y is x else y  # an operator must not return its argument


@torch.library.register_fake("psp_lightning::epilogue")
def _(x: Tensor, fir: Tensor | None, padding: Sequence[int], *_: Any) -> Tensor:
    return launch.empty(x, x.shape if fir is None else filtered_shape(x, fir, padding))


@register_op(
    "epilogue_backward(Tensor dy, Tensor? y, Tensor? x, Tensor? demod, Tensor? noise, float slope, float gain, "
    "float clamp, bool sums) -> (Tensor, Tensor)"
)
def _epilogue_backward(
    dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    slope: float, gain: float, clamp: float, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if kernels := kernels_for(dy):
        return launch.epilogue_backward(kernels, dy, y, x, demod, noise, slope, gain, clamp, sums)
    g, total = epilogue_backward_ref(dy, y, x, demod, noise, slope, gain, clamp)
    g = launch.ordered(g, dy if y is None else y)
    return g.clone() if g is dy else g, total if sums else total.new_empty(0)


@torch.library.register_fake("psp_lightning::epilogue_backward")
def _(dy: Tensor, y: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    *_, sums = others
    total = dy.new_empty((*dy.shape[:2], 3) if sums else (0,), dtype=torch.promote_types(dy.dtype, torch.float32))
    return launch.empty(dy if y is None else y, dy.shape), total


def _save_epilogue(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, fir, padding, demod, noise, strength, bias, slope, gain, clamp = inputs
    active = slope != 1 or gain != 1 or clamp >= 0
    needed = demod is not None and demod.requires_grad  # only this gradient needs x
    ctx.save_for_backward(x if needed else None, fir, demod, noise, strength, bias, output if active else None)
    ctx.padding, ctx.activation = padding, (slope, gain, clamp)
    if fir is not None:
        ctx.adjoint = adjoint_padding(x.shape[2:], output.shape[2:], (1, 1), (1, 1), padding, fir.shape)


def _epilogue_derivative(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad  # x, fir, padding, demod, noise, strength, bias, ...
    # A gradient that is differentiated again must use differentiable operators; the gradient of noise maps is rare.
    once = not torch.is_grad_enabled() and not need[4]
    dx, d_demod, d_noise, d_strength, d_bias = (_fused if once else _composed)(ctx, dy, need)
    return dx, None, None, d_demod, d_noise, d_strength, d_bias, None, None, None


torch.library.register_autograd("psp_lightning::epilogue", _epilogue_derivative, setup_context=_save_epilogue)


def _fused(ctx: Any, dy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, fir, demod, noise, strength, bias, y = ctx.saved_tensors
    step = torch.ops.psp_lightning.epilogue_backward
    noise = noise if need[5] else None
    if fir is None:
        dx, sums = step(dy, y, x, demod, noise, *ctx.activation, need[3] or need[5] or need[6])
        d_demod = sums[..., 0] if need[3] else None
    else:
        du, sums = step(dy, y, None, None, noise, *ctx.activation, need[5] or need[6])
        dx = torch.ops.psp_lightning.upfirdn2d(du, fir, [1, 1], [1, 1], ctx.adjoint, True, 1.0)
        d_demod = None
        if demod is not None:  # sum of du * fir(x) = sum of adjoint_fir(du) * x
            dx, more = step(dx, None, x, demod, None, 1.0, 1.0, -1.0, need[3])
            d_demod = more[..., 0] if need[3] else None
    d_strength = sums[..., 2].sum().to(strength.dtype).reshape(strength.shape) if need[5] else None
    d_bias = sums[..., 1].sum(0).to(bias.dtype) if need[6] else None
    return dx, None if d_demod is None else d_demod.to(demod.dtype), None, d_strength, d_bias


def _composed(ctx: Any, dy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, fir, demod, noise, strength, bias, y = ctx.saved_tensors
    du = dy if y is None else torch.ops.psp_lightning.act_backward(dy, y, *ctx.activation)
    dx = du if demod is None else du * demod[:, :, None, None].to(du.dtype)
    if fir is not None:
        dx = torch.ops.psp_lightning.upfirdn2d(dx, fir, [1, 1], [1, 1], ctx.adjoint, True, 1.0)
    du = du.to(torch.promote_types(du.dtype, torch.float32))  # for sums over whole maps
    d_demod = d_noise = d_strength = d_bias = None
    if need[3]:
        t = x if fir is None else torch.ops.psp_lightning.upfirdn2d(x, fir, [1, 1], [1, 1], ctx.padding, False, 1.0)
        d_demod = (du * t.to(du.dtype)).sum((2, 3)).to(demod.dtype)
    if need[4]:
        d_noise = (du.sum(1, keepdim=True) * strength).sum_to_size(noise.shape).to(noise.dtype)
    if need[5]:
        d_strength = (du * noise).sum().to(strength.dtype).reshape(strength.shape)
    if need[6]:
        d_bias = du.sum([0, *range(2, du.ndim)]).to(bias.dtype)
    return dx, d_demod, d_noise, d_strength, d_bias

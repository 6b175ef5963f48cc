"""Prepare arguments for the CUDA kernels: memory layout, dtypes, factors of a FIR filter, output tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SEPARABLE_FROM = 17  # taps from which two passes over memory, one per axis, cost less than one with all taps
FUSED_TAPS = 4  # per axis, for the epilogue kernel that keeps the FIR filter in registers


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory layout of results for `x`: channels_last if x has only that layout."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor with the dtype, device and memory layout of `like`."""
    return torch.empty(list(shape), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def ordered(y: Tensor, like: Tensor) -> Tensor:
    """Return `y` in the memory layout of `like`, as the fake implementations promise."""
    return y.contiguous(memory_format=memory_format(like))


def _widen(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a small argument (bias, factors, noise) contiguous and in the dtype of sums."""
    return None if t is None else t.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@functools.lru_cache(maxsize=1)
def _factor_cache() -> WeakTensorKeyDictionary:
    return WeakTensorKeyDictionary()


def factors(fir: Tensor, dtype: torch.dtype, flip: bool) -> tuple[Tensor, Tensor] | None:
    """Return taps (kh,) and (kw,) whose outer product is `fir`, in correlation order; None if it is not separable.

    Reading a filter waits for the device, so the answer is cached with the tensor. While a CUDA graph is captured, an
    unknown filter counts as not separable.
    """
    if fir.is_inference():  # has no version counter
        return None
    cache = _factor_cache()
    known = cache.get(fir)
    if known is None or known[0] != fir._version:
        if fir.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        known = (fir._version, _factorize(fir))
        cache[fir] = known
    return known[1].get((dtype, flip))


def _factorize(fir: Tensor) -> dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]]:
    f = fir.detach().to("cpu", torch.float64)
    total, largest = float(f.sum()), float(f.abs().max()) if f.numel() else 0.0
    if abs(total) < 1e-3 * largest or largest == 0:  # the sums below do not determine the factors of such a filter
        return {}
    fy, fx = f.sum(1), f.sum(0) / total
    error = float((torch.outer(fy, fx) - f).abs().max()) / largest
    taps = {False: (fy.flip(0), fx.flip(0)), True: (fy, fx)}
    return {
        (dtype, flip): (taps[flip][0].to(fir.device, dtype), taps[flip][1].to(fir.device, dtype))
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-15))
        for flip in (False, True)
        if error <= bound
    }


def upfirdn2d(
    kernels: Any, x: Tensor, fir: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int],
    flip: bool, gain: float, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """Compute `upfirdn2d_ref` with kernels: taps in registers, two separable passes, or the general kernel."""
    x = x.contiguous(memory_format=memory_format(x))
    out = empty(x, shape)
    if out.numel() == 0 or x.numel() == 0:  # a launch without blocks is an error; without pixels only padding is left
        return out.zero_()
    pad, taps = [padding[0], padding[2]], tuple(fir.shape)
    small = fir.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    registers = max(*up, *down) == 1 and taps == (FUSED_TAPS, FUSED_TAPS)
    pair = None
    if registers or (min(taps) > 1 and fir.numel() >= SEPARABLE_FROM):
        pair = factors(fir, small.dtype, flip)
    if pair is None:
        kernels.upfirdn2d(out, x, small, up, down, pad, flip, gain)
    elif registers:
        kernels.epilogue(out, x, *pair, pad, None, None, None, None, 1.0, gain, -1.0)
    else:  # the factors are in correlation order
        between = empty(x, [shape[0], shape[1], x.shape[2], shape[3]])
        kernels.upfirdn2d(between, x, pair[1][None, :], [1, up[1]], [1, down[1]], [0, pad[1]], True, 1.0)
        kernels.upfirdn2d(out, between, pair[0][:, None], [up[0], 1], [down[0], 1], [pad[0], 0], True, gain)
    return out


def epilogue(
    kernels: Any, x: Tensor, fir: Tensor | None, padding: Sequence[int], demod: Tensor | None,
    noise: Tensor | None, strength: Tensor | None, bias: Tensor | None, slope: float, gain: float, clamp: float,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """Compute `upfirdn2d_ref` and `epilogue_ref` in one pass, or in two if `fir` is not a separable 4x4 filter."""
    x = x.contiguous(memory_format=memory_format(x))
    pair, pad = None, []
    if fir is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        pair = factors(fir, wide, False) if tuple(fir.shape) == (FUSED_TAPS, FUSED_TAPS) else None
        if pair is None:
            x = upfirdn2d(kernels, x, fir, (1, 1), (1, 1), padding, False, 1.0, shape)
        else:
            pad = [padding[0], padding[2]]
    out = empty(x, shape)
    if out.numel():
        fy, fx = (None, None) if pair is None else pair
        small = [_widen(t, x) for t in (demod, noise, strength, bias)]
        kernels.epilogue(out, x, fy, fx, pad, *small, slope, gain, clamp)
    return out


def epilogue_backward(
    kernels: Any, dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    slope: float, gain: float, clamp: float, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `epilogue_backward_ref` with its kernel."""
    order = memory_format(dy if y is None else y)
    dy = dy.contiguous(memory_format=order)
    y, x = (t if t is None else t.contiguous(memory_format=order) for t in (y, x))
    g = empty(dy if y is None else y, dy.shape)
    wide = torch.promote_types(dy.dtype, torch.float32)
    if g.numel() == 0:
        return g, dy.new_zeros((*dy.shape[:2], 3) if sums else (0,), dtype=wide)
    partials = kernels.epilogue_backward(g, dy, y, x, _widen(demod, dy), _widen(noise, dy), slope, gain, clamp, sums)
    return g, partials.sum(2) if sums else partials.new_empty(0)

"""Arguments for the CUDA kernels: order in memory, types, factors of a filter, room for the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SEPARABLE_FROM = 17  # taps from which two passes over memory, one an axis, cost less than one with all taps
FUSED_TAPS = 4  # of the filter that the epilogue's kernel has in registers


def memory_format(x: Tensor) -> torch.memory_format:
    """The order in memory of results for `x`: channels_last where x has that order and no other."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for a result: type, device and order of `like`."""
    return torch.empty(list(shape), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def ordered(y: Tensor, like: Tensor) -> Tensor:
    """`y` in the order of `like`, which is what the fake implementations promise."""
    return y.contiguous(memory_format=memory_format(like))


def _small(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Bias, factors, noise, filter: contiguous, in the type that sums have."""
    return None if t is None else t.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@functools.lru_cache(maxsize=1)
def _known_factors() -> WeakTensorKeyDictionary:
    return WeakTensorKeyDictionary()


def factors(filter: Tensor, dtype: torch.dtype, flip: bool) -> tuple[Tensor, Tensor] | None:
    """Taps (kh,) and (kw,) whose outer product is `filter`, in the order of correlation; None where there are none.

    Looking at a filter waits for the device, so the answer is kept with the filter; while a CUDA graph is captured an
    unknown filter counts as not separable.
    """
    if filter.is_inference():  # keeps no count of changes
        return None
    cache = _known_factors()
    known = cache.get(filter)
    if known is None or known[0] != filter._version:
        if filter.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        known = (filter._version, _factorise(filter))
        cache[filter] = known
    return known[1].get((dtype, flip))


def _factorise(filter: Tensor) -> dict[tuple[torch.dtype, bool], tuple[Tensor, Tensor]]:
    f = filter.detach().to("cpu", torch.float64)
    total, largest = float(f.sum()), float(f.abs().max()) if f.numel() else 0.0
    if abs(total) < 1e-3 * largest or largest == 0:  # the sums below say nothing of such a filter
        return {}
    fy, fx = f.sum(1), f.sum(0) / total
    error = float((torch.outer(fy, fx) - f).abs().max()) / largest
    taps = {False: (fy.flip(0), fx.flip(0)), True: (fy, fx)}
    return {
        (dtype, flip): (taps[flip][0].to(filter.device, dtype), taps[flip][1].to(filter.device, dtype))
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-15))
        for flip in (False, True)
        if error <= bound
    }


def upfirdn2d(
    kernels: Any, x: Tensor, filter: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int],
    flip: bool, gain: float, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """`upfirdn2d_ref` by kernels: the one with its taps in registers, two passes, or the general one."""
    x = x.contiguous(memory_format=memory_format(x))
    out = empty(x, shape)
    if out.numel() == 0:
        return out
    pad, taps = [padding[0], padding[2]], tuple(filter.shape)
    small = _small(filter, x)
    assert small is not None
    plain = max(*up, *down) == 1
    registers = plain and taps == (FUSED_TAPS, FUSED_TAPS)
    pair = None
    if registers or (min(taps) > 1 and filter.numel() >= SEPARABLE_FROM):
        pair = factors(filter, small.dtype, flip)
    if pair is None:
        kernels.upfirdn2d(out, x, small, up, down, pad, flip, gain)
    elif registers:
        kernels.epilogue(out, x, *pair, pad, None, None, None, None, 1.0, gain, -1.0)
    else:  # the pairs are in the order of correlation
        between = empty(x, [shape[0], shape[1], x.shape[2], shape[3]])
        kernels.upfirdn2d(between, x, pair[1][None, :], [1, up[1]], [1, down[1]], [0, pad[1]], True, 1.0)
        kernels.upfirdn2d(out, between, pair[0][:, None], [up[0], 1], [down[0], 1], [pad[0], 0], True, gain)
    return out


def epilogue(
    kernels: Any, x: Tensor, blur: Tensor | None, padding: Sequence[int], demod: Tensor | None,
    noise: Tensor | None, strength: Tensor | None, bias: Tensor | None, slope: float, gain: float, clamp: float,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """`upfirdn2d_ref` and `epilogue_ref` in one pass; in two where the filter has another size or is not separable."""
    x = x.contiguous(memory_format=memory_format(x))
    pair, pad = None, []
    if blur is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        pair = factors(blur, wide, False) if tuple(blur.shape) == (FUSED_TAPS, FUSED_TAPS) else None
        if pair is None:
            x = upfirdn2d(kernels, x, blur, (1, 1), (1, 1), padding, False, 1.0, shape)
        else:
            pad = [padding[0], padding[2]]
    out = empty(x, shape)
    if out.numel():
        fy, fx = (None, None) if pair is None else pair
        small = [_small(t, x) for t in (demod, noise, strength, bias)]
        kernels.epilogue(out, x, fy, fx, pad, *small, slope, gain, clamp)
    return out


def epilogue_backward(
    kernels: Any, dy: Tensor, y: Tensor | None, x: Tensor | None, demod: Tensor | None, noise: Tensor | None,
    slope: float, gain: float, clamp: float, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`epilogue_backward_ref` by its kernel."""
    order = memory_format(dy if y is None else y)
    dy = dy.contiguous(memory_format=order)
    y, x = (t if t is None else t.contiguous(memory_format=order) for t in (y, x))
    g = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device, memory_format=order)
    wide = torch.promote_types(dy.dtype, torch.float32)
    if g.numel() == 0:
        return g, dy.new_zeros((*dy.shape[:2], 3) if sums else (0,), dtype=wide)
    partials = kernels.epilogue_backward(g, dy, y, x, _small(demod, dy), _small(noise, dy), slope, gain, clamp, sums)
    return g, partials.sum(2) if sums else partials.new_empty(0)

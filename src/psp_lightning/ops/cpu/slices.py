"""Slices of large tensors that fit the processor's cache."""

from __future__ import annotations

from torch import Tensor

SLICE = 1 << 19  # approximate number of elements


def slices(x: Tensor) -> list[tuple[slice, ...]]:
    """Return indices that cut x (B, C, H, W) along H.

    Several passes over a large tensor read main memory only once if they are done slice by slice, and intermediate
    values need no memory of the size of the tensor.
    """
    step = max(1, SLICE // max(1, x.shape[0] * x.shape[1] * x.shape[3]))
    return [(slice(None), slice(None), slice(i, i + step)) for i in range(0, x.shape[2], step)]

"""Half precision in the high-resolution blocks of a network, where nearly all of its time and memory goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

FLOAT16_LIMIT = 256.0  # published bound of the activations, far inside float16's range


class HalfPrecision(nn.Module):
    """Base of networks whose blocks from a resolution on may run in bfloat16 or float16.

    Source: StyleGAN2-ADA (arXiv:2006.06676), appendix D: mixed precision in the four highest resolutions, activations
    clamped to 256.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half_from: int | None = None
        self.half_dtype = torch.bfloat16

    def use_half(self, resolution: int | None, dtype: torch.dtype = torch.bfloat16) -> None:
        """Run blocks at `resolution` and above in `dtype`; None: everything in the weights' own precision."""
        self.half_from, self.half_dtype = resolution, dtype

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Run every block in the weights' own precision within this context; `use_half` holds again after it."""
        resolution, self.half_from = self.half_from, None
        try:
            yield
        finally:
            self.half_from = resolution

    def is_half(self, resolution: int) -> bool:
        """Whether the block at `resolution` runs in half precision."""
        return self.half_from is not None and resolution >= self.half_from

    def precision(self, resolution: int, device: torch.device) -> AbstractContextManager[None]:
        """Context for the block at `resolution`."""
        if not self.is_half(resolution):
            return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))
        return torch.autocast(device.type, dtype=self.half_dtype)

    def cast(self, x: Tensor, resolution: int) -> Tensor:
        """`x` in the precision of the block."""
        return x.to(self.half_dtype) if self.is_half(resolution) else x.float() if self.half_from is not None else x

    def bound(self, resolution: int) -> float | None:
        """Bound of the activations' absolute values: of float16 blocks."""
        return FLOAT16_LIMIT if self.is_half(resolution) and self.half_dtype == torch.float16 else None

    def clamp(self, x: Tensor, resolution: int) -> Tensor:
        """`x` within the bound."""
        bound = self.bound(resolution)
        return x if bound is None else x.clamp(-bound, bound)

"""PReLU with a fast derivative on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.ops.cpu.slices import slices
from psp_lightning.ops.dispatch import is_batched, is_captured


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Return `F.prelu(x, weight)` for x (B, C, ...) and slopes (C,); training on the CPU uses a faster derivative."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fits = x.ndim == 4 and len(weight) == x.shape[1] and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
    if not wanted or x.device.type != "cpu" or not fits or is_captured():
        return F.prelu(x, weight)
    return _PReLU.apply(x, weight)  # type: ignore[no-any-return]


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.prelu(x, weight.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        slope = weight[:, None, None]
        if torch.is_grad_enabled() or is_batched(dy):  # for second derivatives, or many dy at once
            below = torch.where(x > 0, 0, dy)
            dx, dw = dy + below * (slope.to(x.dtype) - 1), (below * x).sum((0, 2, 3))
            return dx, dw.to(weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        for rows in slices(x):
            d, v = dy[rows].to(wide), x[rows].to(wide)
            above = torch.ops.aten.leaky_relu_backward(d, v, 0.0, False)  # far faster than torch.where
            below = d - above
            if ctx.needs_input_grad[1]:
                dw += (below * v).sum((0, 2, 3))
            dx[rows].copy_(above.addcmul_(below, slope))
        return dx if ctx.needs_input_grad[0] else None, dw.to(weight.dtype) if ctx.needs_input_grad[1] else None

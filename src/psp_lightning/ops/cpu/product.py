"""Matrix products on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return `a @ b + plus` of matrices (M, K) and (K, N), on any device and dtype; fast on the CPU in float32.

    `plus` is a row (N,) or a matrix (M, N). In float32 PyTorch uses MKL, which reaches only half the speed of oneDNN on
    non-Intel processors. oneDNN's operator has no derivative, so PyTorch's product is used if a derivative is needed.
    """
    plain = a.dtype != torch.float32 or a.device.type != "cpu" or not has_onednn() or not a.numel() or not b.numel()
    size = (a.shape[0], b.shape[1])
    plain = plain or (plus is not None and plus.shape not in (size, size[1:]))  # oneDNN does not check
    differentiated = any(t is not None and t.requires_grad for t in (a, b, plus))
    if plain or (torch.is_grad_enabled() and differentiated):
        return a @ b if plus is None else torch.addmm(plus, a, b)
    plus = None if plus is None else plus.contiguous()
    if plus is not None and plus.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise.binary(a, plus, b.t(), None, "add")  # type: ignore[no-any-return]
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), plus, "none", [], "")  # type: ignore[no-any-return]


def has_onednn() -> bool:
    """Return whether oneDNN computes `product` in float32; PyTorch's operator for it is not public."""
    on = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    return on and hasattr(torch.ops.mkldnn, "_linear_pointwise")

"""Which path a call takes: the registered operator with its CUDA kernel, or plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from psp_lightning.ops.cuda.choice import choice
from psp_lightning.utils.errors import UserError

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_forced = False


def use_op(x: Tensor) -> bool:
    """Whether a call with `x` goes to the registered operator. On the CPU never: plain PyTorch, as fast as before.

    While torch.compile or torch.export trace CUDA tensors the answer does not depend on a build, which would have no
    place in a graph: the operator itself takes the kernel or plain PyTorch when it runs.

    Raises:
        UserError: for PSP_OPS=cuda where the kernels cannot run.
    """
    if _forced:
        return True
    if not x.is_cuda:
        if not torch.compiler.is_compiling() and choice() == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "PSP_OPS=cuda, but PyTorch finds no GPU. Unset it, or set PSP_OPS=auto; `psp-doctor ops` says more."
            )
        return False
    if choice() == "ref" or x.dtype not in DTYPES:
        return False
    if torch.compiler.is_compiling():
        return True
    from psp_lightning.ops.cuda.build import kernels  # only where there is a GPU

    return kernels() is not None


def is_captured() -> bool:
    """Whether a graph is being captured, or torch.func or forward mode differentiates: no place for what is kept
    between calls, nor for operators without derivatives."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors (vmap, `is_grads_batched`), for which nothing may be written in place."""
    return is_captured() or torch._C._functorch.is_legacy_batchedtensor(x)


@contextmanager
def registered() -> Iterator[None]:
    """Within it every call goes to the registered operators, on the CPU too: to test them and to trace them there."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before

"""Dispatch calls to plain PyTorch or to registered operators with CUDA kernels, and register these operators.

Operators are declared to torch.library, so torch.compile, torch.export and autocast treat each as one step. An operator
has an implementation for the CPU (plain PyTorch) and for CUDA (the kernel, or plain PyTorch if it cannot be built), a
fake implementation (only shapes and strides), and a derivative. Derivatives use these operators again, so derivatives
of every order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from psp_lightning.ops.cuda.choice import choice
from psp_lightning.utils.errors import UserError

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_forced = False


def use_op(x: Tensor) -> bool:
    """Return whether a call with `x` uses the registered operator; on the CPU it never does.

    While torch.compile or torch.export trace CUDA tensors, the answer does not depend on a build, which cannot be part
    of a graph: the operator itself chooses the kernel or plain PyTorch when it runs.

    Raises:
        UserError: PSP_OPS=cuda, but PyTorch finds no GPU, or the kernels cannot be built.
    """
    if _forced:
        return True
    if not x.is_cuda:
        if not torch.compiler.is_compiling() and choice() == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "PSP_OPS=cuda, but PyTorch finds no GPU. Unset it or set PSP_OPS=auto. Run psp-doctor ops for details."
            )
        return False
    if choice() == "ref" or x.dtype not in DTYPES:
        return False
    return torch.compiler.is_compiling() or kernels_for(x) is not None


def kernels_for(x: Tensor) -> Any:
    """Return the kernels for a CUDA tensor; None for other tensors, and if plain PyTorch must be used."""
    if not x.is_cuda or choice() == "ref":
        return None
    from psp_lightning.ops.cuda.build import kernels  # only with a GPU

    return kernels()


def is_captured() -> bool:
    """Return whether a graph is being captured, or torch.func or forward-mode AD is active.

    Operators that do not support these must not be used in these cases.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Return whether x represents many tensors (vmap, `is_grads_batched`), which cannot be written in place."""
    return is_captured() or torch._C._functorch.is_legacy_batchedtensor(x)


@contextmanager
def registered() -> Iterator[None]:
    """Use the registered operators for every call in this context, even on the CPU, to test and trace them there."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def register_op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare `psp_lightning::SCHEMA` with the decorated function as its implementation on CPU and CUDA."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        name = "psp_lightning::" + schema.partition("(")[0]
        torch.library.define(name, "(" + schema.partition("(")[2], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, ("CPU", "CUDA"), function)
        return function

    return declare

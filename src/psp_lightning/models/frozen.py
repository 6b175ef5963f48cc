"""Freezing a network for good."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _StayInEval:
    """Stands in for `train` of one frozen module. A class and not a closure, so that it can be pickled and copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


def freeze(module: ModuleT) -> ModuleT:
    """Freezes `module` in place and returns it.

    Eval mode for ever: `.train()`, on it or on a parent, leaves it and all its submodules in eval mode, so that
    BatchNorm statistics stay as they are and dropout stays off. No parameter requires a gradient, so backward
    computes none for the weights (gradients still flow through to the input).
    """
    module.eval()
    module.requires_grad_(False)
    for part in module.modules():
        part.__dict__["train"] = _StayInEval(part)
    return module


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` was applied to `module` and none of its parameters was unfrozen since."""
    return isinstance(module.__dict__.get("train"), _StayInEval) and not any(
        p.requires_grad for p in module.parameters()
    )

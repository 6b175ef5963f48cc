"""Parts that the networks share: the equalised linear layer, half precision, freezing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.ops import fir_filter, fused_leaky_relu

FLOAT16_LIMIT = 256.0  # published bound of the activations, far inside the range of float16

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class EqualisedLinear(nn.Module):
    """A linear layer whose stored weights have unit variance and are scaled when used.

    Source: Karras et al., Progressive GAN (arXiv:1710.10196), section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_init: float = 0.0,  # initial value of the stored bias
        lr_multiplier: float = 1.0,  # factor of the effective learning rate of weight and bias
        activation: bool = False,  # apply `fused_leaky_relu`
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.scale = lr_multiplier / math.sqrt(in_features)
        self.lr_multiplier = lr_multiplier
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_features) to (B, out_features)."""
        bias = self.bias * self.lr_multiplier
        if self.activation:
            return fused_leaky_relu(F.linear(x, self.weight * self.scale), bias)
        return F.linear(x, self.weight * self.scale, bias)


class FIRFilter(nn.Module):
    """A FIR filter as a buffer, which moves with the network, and is saved with it if it is `persistent`."""

    kernel: Tensor

    def __init__(self, gain: float = 1.0, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("kernel", fir_filter(gain=gain), persistent)

    @property
    def taps(self) -> Tensor:
        """The filter, never as an inference tensor.

        The CUDA kernels cache the factors of a filter together with its version counter, which inference tensors lack.
        With this property, a network that was built, copied or moved under `torch.inference_mode` is as fast as any
        other.
        """
        if not torch.compiler.is_compiling() and self.kernel.is_inference():
            with torch.inference_mode(False):
                self.kernel = self.kernel.clone()
        return self.kernel


class HalfPrecision(nn.Module):
    """The base class of networks that can run their blocks from a given resolution in bfloat16 or float16.

    These blocks take nearly all time and memory.

    Source: StyleGAN2-ADA (arXiv:2006.06676), appendix D: mixed precision in the four highest resolutions, activations
    clamped to 256.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half_from: int | None = None
        self.half_dtype = torch.bfloat16

    def use_half(self, resolution: int | None, dtype: torch.dtype = torch.bfloat16) -> None:
        """Run blocks at `resolution` and above in `dtype`; None: run all blocks in the precision of the weights."""
        self.half_from, self.half_dtype = resolution, dtype

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Run every block in the precision of the weights inside this context, then restore `use_half`."""
        resolution, self.half_from = self.half_from, None
        try:
            yield
        finally:
            self.half_from = resolution

    def is_half(self, resolution: int) -> bool:
        """Return whether the block at `resolution` runs in half precision."""
        return self.half_from is not None and resolution >= self.half_from

    def precision(self, resolution: int, device: torch.device) -> AbstractContextManager[None]:
        """Return the autocast context of the block at `resolution`."""
        if not self.is_half(resolution):
            return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))
        return torch.autocast(device.type, dtype=self.half_dtype)

    def cast(self, x: Tensor, resolution: int) -> Tensor:
        """Return `x` in the precision of the block at `resolution`."""
        return x.to(self.half_dtype) if self.is_half(resolution) else x.float() if self.half_from is not None else x

    def bound(self, resolution: int) -> float | None:
        """Return the bound of absolute activations; only float16 blocks have one."""
        return FLOAT16_LIMIT if self.is_half(resolution) and self.half_dtype == torch.float16 else None

    def clamp(self, x: Tensor, resolution: int) -> Tensor:
        """Return `x` clamped to the bound."""
        bound = self.bound(resolution)
        return x if bound is None else x.clamp(-bound, bound)


class _StayInEval:
    """A replacement for `train` of a frozen module. It is a class because a closure cannot be pickled and copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


def freeze(module: ModuleT) -> ModuleT:
    """Freeze `module` in place and return it.

    The module stays in eval mode: `.train()`, called on it or on a parent, changes neither the module nor its
    submodules, so BatchNorm statistics do not change and dropout stays off. No parameter requires a gradient, so
    backward computes none for the weights; gradients still flow to the input.
    """
    module.eval()
    module.requires_grad_(False)
    for part in module.modules():
        part.__dict__["train"] = _StayInEval(part)
    return module

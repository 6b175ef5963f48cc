"""Measurements of each kernel at the shapes of the 1024 px generator, compared with copying and plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare.floor import bandwidth, best
from benchmarks.compare.rows import Job
from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, upfirdn2d
from psp_lightning.ops.bias_act import bias_act_ref
from psp_lightning.ops.epilogue import epilogue_ref
from psp_lightning.ops.upfirdn2d import upfirdn2d_ref

GAIN = 2**0.5


def sizes(largest: int) -> list[tuple[int, int]]:
    """Return (channels, side) of the generator's most expensive layers: the last three resolutions."""
    return [(min(512, 32768 // side), side) for side in (largest // 4, largest // 2, largest)]


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel: its name, the bytes that it must move, the kernel, and its equivalent in plain PyTorch."""

    name: str
    moved: int
    run: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def moved(*tensors: Tensor) -> int:
    """Return the bytes of tensors that are read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kernels_at(batch: int, channels: int, side: int, dtype: torch.dtype, device: str) -> list[Kernel]:
    """Return every kernel for a layer of (batch, channels, side, side) in channels_last order."""

    def draw(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, device=device).to(kind)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    fir = fir_filter(gain=4).to(device)
    x, grown = draw(batch, channels, side, side, kind=dtype), draw(batch, channels, side + 1, side + 1, kind=dtype)
    small = draw(batch, 3, side // 2, side // 2)  # the image of lower layers is in full precision
    bias, half_bias = draw(channels), draw(channels, kind=dtype)
    demod, noise, strength = draw(batch, channels), draw(1, 1, side, side), draw(1)
    shape = f"{batch}x{channels}x{side}x{side}"

    def epilogue(x: Tensor) -> Tensor:
        return epilogue_ref(x, demod, noise, strength, bias, 0.2, GAIN, None)

    return [
        Kernel(
            f"bias_act {shape}",
            moved(x, x),
            lambda: fused_leaky_relu(x, half_bias),
            lambda: bias_act_ref(x, half_bias, 0.2, GAIN),
        ),
        Kernel(
            f"modconv_epilogue {shape}",
            moved(x, x, noise),
            lambda: modconv_epilogue(x, None, (0, 0), demod, noise, strength, bias),
            lambda: epilogue(x),
        ),
        Kernel(
            f"modconv_epilogue with filter {shape}",
            moved(grown, x, noise),
            lambda: modconv_epilogue(grown, fir, (1, 1), demod, noise, strength, bias),
            lambda: epilogue(upfirdn2d_ref(grown, fir, padding=(1, 1, 1, 1))),
        ),
        Kernel(
            f"upfirdn2d up=2 {batch}x3x{side // 2}x{side // 2}",
            5 * moved(small),
            lambda: upfirdn2d(small, fir, up=2, padding=(2, 1)),
            lambda: upfirdn2d_ref(small, fir, (2, 2), (1, 1), (2, 1, 2, 1)),
        ),
    ]


@torch.no_grad()  # not inference_mode, which would make filters that the fused kernel does not take
def measure_kernels(job: Job) -> dict[str, Any]:
    """Measure all kernels.

    Returns:
        `kernels`, a list with `name`, `dtype`, `seconds`, `torch_seconds`, `of_copy` (share of the measured copy
        bandwidth) and `faster` (speed relative to plain PyTorch) for each kernel.
    """
    speed = bandwidth(job.device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layers = [kernels_at(job.batch, *size, dtype, job.device) for size in sizes(job.size)]
        for kernel in itertools.chain(*layers):
            seconds, plainly = best(kernel.run, job.device), best(kernel.plain, job.device)
            figures = {"seconds": seconds, "torch_seconds": plainly, "faster": plainly / seconds}
            kind = str(dtype).removeprefix("torch.")
            found.append({"name": kernel.name, "dtype": kind, **figures, "of_copy": kernel.moved / seconds / speed})
    return {"kernels": found}

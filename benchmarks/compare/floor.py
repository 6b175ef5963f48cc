"""The least time that a machine needs for a network, from its operations and memory traffic at measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compare.rows import FLOAT32, Job
from psp_lightning import PSP

CALLS = 10  # calls in one timing on a GPU
SLEEP = 50_000_000  # cycles, about 30 ms: as long as the host may take to launch them


def best(run: Callable[[], Any], device: str, times: int = 10) -> float:
    """Return the seconds of the fastest of `times` runs after one warm-up.

    On a GPU a run is several calls, timed by events on the device. They wait in its queue until all are launched, so
    launch times do not count.
    """
    once = _device_seconds if device == "cuda" else _host_seconds
    return min([once(run) for _ in range(times + 1)][1:])


def _host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def matrix_rate(device: str, dtype: torch.dtype, side: int | None = None) -> float:
    """Return the operations per second of the product of two square matrices.

    On a GPU it uses TensorFloat-32 if convolutions do. On a CPU, return the better rate of this product and a 3x3
    convolution, because another library computes the convolution, on some processors with wider instructions.
    """
    n = side or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        product = 2 * n**3 / best(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if device != "cpu":
        return product
    channels, pixels = n // 2, 32
    x, w = (torch.randn(shape).to(dtype) for shape in ((1, channels, pixels, pixels), (channels, channels, 3, 3)))
    x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    return max(product, 2 * (channels * pixels * 3) ** 2 / best(lambda: F.conv2d(x, w, padding=1), device))


def bandwidth(device: str, size: int | None = None) -> float:
    """Return the bytes per second of copying within the device's memory; bytes read and written both count."""
    n = size or (1 << 30 if device == "cuda" else 1 << 28)
    a = torch.zeros(n, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * n / best(lambda: b.copy_(a), device)


class Layers(TorchDispatchMode):
    """A mode that records operations and elements (read and written) of every convolution and matrix product.

    Filters of single channels and elementwise operations are left out, because they can be done while the result of a
    convolution is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            if groups == 1 or groups < x.shape[1]:
                work = 2 * (x if transposed else out).numel() * weight[0].numel()
                self._add(work, x, weight, out)
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]
            self._add(2 * out.numel() * a.shape[-1], a, b, out)
        return out

    def _add(self, work: int, *tensors: Tensor) -> None:
        self.found.append((work, sum(tensor.numel() for tensor in tensors)))


def floor(description: Mapping[str, Any], job: Job) -> dict[str, float]:
    """Return the least time from source to image.

    For each layer, this is the larger of operations / matrix rate and bytes / bandwidth. Nothing is computed and no
    memory is used: the plain network is traced as torch.compile sees it, so that device-specific work does not count.

    Args:
        description: `PSP.describe()` of the network.
        job: batch size, side and device.

    Returns:
        `floor_seconds`, `operations`, `bytes`, `rate` (operations per second) and `bandwidth` (bytes per second).
    """
    dtype = torch.float32 if job.side == FLOAT32 else torch.bfloat16
    rate, speed = matrix_rate(job.device, dtype), bandwidth(job.device)
    tracing = mock.patch.object(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad(), tracing, FakeTensorMode():
        with torch.device(job.device):
            net = PSP.from_description(description).eval()
        side: int = net.encoder.input_size  # type: ignore[assignment]
        x = torch.empty(job.batch, 3, side, side, device=job.device)
        with Layers() as layers:
            net(x)
    width = dtype.itemsize
    return {
        "floor_seconds": sum(max(work / rate, width * elements / speed) for work, elements in layers.found),
        "operations": sum(work for work, _ in layers.found),
        "bytes": sum(width * elements for _, elements in layers.found),
        "rate": rate,
        "bandwidth": speed,
    }

"""Tests that need a GPU: streams, devices, graphs, huge tensors, memory errors, whole networks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, upfirdn2d
from psp_lightning.ops.bias_act import bias_act_ref
from psp_lightning.ops.check import relative_error
from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.upfirdn2d import upfirdn2d_ref
from tests.ops.networks import assert_networks_agree, network_values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact(full_float32: None) -> None:
    """Load the kernels and compute convolutions in full float32."""
    assert _jit.kernels() is not None, "PSP_OPS=ref is set, or the build failed"


def all_ops(x: torch.Tensor, fir: torch.Tensor | None = None) -> torch.Tensor:
    """Run every kernel once, including its backward."""
    x = x.detach().requires_grad_()
    fir = fir_filter(gain=4).to(x.device) if fir is None else fir
    demod = torch.linspace(0.5, 1.5, x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]).requires_grad_()
    bias = torch.linspace(-1, 1, x.shape[1], device=x.device, requires_grad=True)
    y = modconv_epilogue(x, fir, (1, 1), demod, bias=bias)
    y = upfirdn2d(modconv_epilogue(y, demod=demod, bias=bias), fir, 2, 1, (2, 1))
    y = fused_leaky_relu(upfirdn2d(y, fir, 1, 2, (1, 1)), bias)
    grads = torch.autograd.grad(y.square().sum(), (x, demod, bias))
    return torch.cat([t.double().flatten() for t in (y, *grads)])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "last"])
def test_the_current_stream(order: torch.memory_format) -> None:
    """Kernels on a second stream wait for the inputs made there; the default stream would read them too early."""
    x = torch.randn(2, 16, 65, 65).contiguous(memory_format=order)
    early, fir = x.to(CUDA), fir_filter(gain=4).to(CUDA)
    late = torch.full_like(early, float("nan"))
    expected = all_ops(early, fir)  # the first call looks at the filter, which waits for the device
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        all_ops(early, fir)  # allocates, which may wait too
        torch.cuda._sleep(200_000_000)  # about 0.1 s; nothing below waits, so all is launched while the stream sleeps
        late.copy_(early)
        found = all_ops(late, fir)
    stream.synchronize()
    assert relative_error(found, expected) < 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_own_device() -> None:
    x = torch.randn(2, 16, 33, 33)
    expected = all_ops(x.to("cuda:0"))
    with torch.cuda.device(0):
        found = all_ops(x.to("cuda:1"))
    assert found.device == torch.device("cuda:1") and relative_error(found, expected) < 1e-6


def test_equal_inputs_give_equal_bits() -> None:
    x = torch.randn(4, 32, 129, 129, device=CUDA)
    assert torch.equal(all_ops(x), all_ops(x))


def test_a_captured_graph_replays_the_kernels() -> None:
    fir = fir_filter(gain=4).to(CUDA)
    x, bias = torch.randn(2, 16, 33, 33, device=CUDA), torch.randn(16, device=CUDA)

    def step() -> torch.Tensor:
        return upfirdn2d(modconv_epilogue(x, fir, (1, 1), bias=bias), fir, 2, 1, (2, 1))

    with torch.no_grad():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(torch.randn(2, 16, 33, 33))
        graph.replay()
        assert torch.equal(captured, step())


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.slow
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "last"])
def test_more_elements_than_32_bits_can_index(order: torch.memory_format) -> None:
    """The first and last samples equal the same samples computed alone; a 32-bit index would overflow."""
    b, c, side = 9, 64, 2048  # 2.4 billion
    if free_bytes() < 5 * b * c * side**2 * 2:
        pytest.skip("needs 25 GB of free GPU memory")
    fir, bias = fir_filter((1, 3, 2, 1), gain=4).to(CUDA), torch.linspace(-1, 1, c, device=CUDA)
    demod = torch.linspace(0.5, 1.5, b * c, device=CUDA).view(b, c)
    x = torch.empty(b, c, side, side, dtype=torch.float16, device=CUDA, memory_format=order).normal_()
    assert x.numel() > 2**31
    with torch.no_grad():
        for function in (
            lambda x, d: modconv_epilogue(x, None, (0, 0), d, bias=bias),
            lambda x, d: modconv_epilogue(x, fir, (2, 1), d, bias=bias),
            lambda x, d: upfirdn2d(x, fir, 1, 1, (2, 1), gain=0.5),
            lambda x, d: upfirdn2d(x, fir[:3], 1, 2, (1, 2)),
        ):
            whole = function(x, demod)
            for i in (0, b - 1):
                part = function(x[i : i + 1].contiguous(memory_format=order), demod[i : i + 1])
                assert torch.equal(whole[i : i + 1], part), f"sample {i}"
            del whole, part
        y = fused_leaky_relu(x, bias.half())
        g, sums = torch.ops.psp_lightning.epilogue_backward(x, y, None, demod, None, 0.2, 2**0.5, -1.0, True)
        for i in (0, b - 1):
            part = torch.ops.psp_lightning.epilogue_backward(
                x[i : i + 1].contiguous(memory_format=order), y[i : i + 1].contiguous(memory_format=order), None,
                demod[i : i + 1], None, 0.2, 2**0.5, -1.0, True,
            )  # fmt: skip
            # PyTorch adds the sums of the chunks in an order that depends on the shape
            assert torch.equal(g[i : i + 1], part[0]) and relative_error(sums[i : i + 1], part[1], side) < 1e-6


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
def test_generator_and_discriminator_agree_with_plain_pytorch(half, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, gradients, and the gradient of a penalty: kernels in each precision, and plain PyTorch in float32."""
    found = network_values(CUDA, half)
    monkeypatch.setenv("PSP_OPS", "ref")
    assert_networks_agree(found, network_values(CUDA, None), half)


def test_compiled_generator_uses_the_kernels() -> None:
    torch.manual_seed(0)
    generator = Generator(16, style_dim=16, n_mapping=1, max_channels=16).to(CUDA)
    z = torch.randn(2, 16, device=CUDA)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(generator, backend="aot_eager", fullgraph=True)(z)
        assert relative_error(found, generator(z)) < 1e-5


def test_ref_means_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSP_OPS", "ref")
    x, bias = torch.randn(2, 4, 8, 8, device=CUDA), torch.randn(4, device=CUDA)
    assert torch.equal(fused_leaky_relu(x, bias), bias_act_ref(x, bias, 0.2, 2**0.5))
    fir = fir_filter().to(CUDA)
    assert torch.equal(upfirdn2d(x, fir, padding=(1, 2)), upfirdn2d_ref(x, fir, padding=(1, 2, 1, 2)))


SANITISED = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from tests.ops.test_gpu import all_ops
for dtype in (torch.float32, torch.bfloat16):
    for order in (torch.contiguous_format, torch.channels_last):
        for shape in ((2, 16, 17, 15), (1, 3, 9, 9)):
            all_ops(torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=order))
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """PyTorch's cache is off, so a read outside a tensor is also outside an allocation."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-c", SANITISED, str(Path(__file__).parents[2])]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "done" in done.stdout, (done.stdout + done.stderr)[-3000:]

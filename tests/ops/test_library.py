"""The operators registered with torch.library on the CPU: derivatives, torch.compile, torch.export, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops import dispatch as _dispatch
from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, upfirdn2d
from psp_lightning.ops.dispatch import registered
from tests.ops.networks import assert_networks_agree, network_values


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=source, dtype=torch.float64).requires_grad_()


FIR = torch.tensor([[1.0, 2, 0, -1], [0, 3, 1, 1], [2, 0, 0, 1], [1, 1, -2, 0]], dtype=torch.float64) / 4


@pytest.fixture
def generator() -> Generator:
    network = Generator.seeded(0, output_size=16, style_dim=8, n_mapping=1, max_channels=8)
    for name, parameter in network.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.constant_(parameter, 0.3)
    return network


def test_operators_pass_the_checks_of_torch_library():
    """PyTorch's checker tests schema, fake implementation, registration of the derivative, and tracing."""
    ops = torch.ops.psp_lightning
    x, demod, noise, strength, bias = leaf(2, 3, 4, 5), leaf(2, 3), leaf(1, 1, 5, 6), leaf(1), leaf(3)
    rest = (0.2, 1.4, 3.0)
    torch.library.opcheck(ops.epilogue.default, (x, FIR, [2, 2, 2, 2], demod, noise, strength, bias, *rest))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops.epilogue.default, (last, None, [], None, None, None, bias, *rest))
    torch.library.opcheck(ops.epilogue.default, (last, None, [], None, None, None, None, 1.0, 1.0, -1.0))
    torch.library.opcheck(ops.upfirdn2d.default, (last, FIR, [2, 1], [1, 2], [2, 1, -1, 3], True, 1.4))
    torch.library.opcheck(ops.act_backward.default, (x, leaf(2, 3, 4, 5, seed=1).detach(), *rest))
    plain = [t.detach() for t in (x, leaf(2, 3, 4, 5, seed=1), x, demod)]
    torch.library.opcheck(ops.epilogue_backward.default, (*plain, None, *rest, True))
    torch.library.opcheck(ops.epilogue_backward.default, (*plain, None, *rest, False))


def test_derivatives_of_the_registered_epilogue():
    inputs = (leaf(2, 2, 3, 4), leaf(2, 2), None, leaf(1), leaf(2))
    with registered():
        for fir, padding in ((FIR, (2, 2)), (None, (0, 0))):
            side = (4, 5) if fir is not None else (3, 4)
            noise = leaf(1, 1, *side)
            fixed = noise.detach()

            def every(x, d, n, s, b, f=fir, p=padding):
                return modconv_epilogue(x, f, p, d, n, s, b, clamp=3.0)

            def without_noise_maps(x, d, s, b, n=fixed, f=fir, p=padding):  # uses the fused backward
                return modconv_epilogue(x, f, p, d, n, s, b, clamp=3.0)

            given = (inputs[0], inputs[1], noise, inputs[3], inputs[4])
            assert gradcheck(every, given) and gradgradcheck(every, given, fast_mode=True)
            given = (inputs[0], inputs[1], inputs[3], inputs[4])
            assert gradcheck(without_noise_maps, given) and gradgradcheck(without_noise_maps, given, fast_mode=True)


@pytest.mark.parametrize("up, down, padding", [(1, 1, (1, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (3, 2, (-1, 2))])
def test_derivatives_of_the_registered_filter(up, down, padding):
    with registered():
        for flip in (False, True):

            def function(x, f=flip):
                return upfirdn2d(x, FIR, up, down, padding, f, 1.7)

            x = (leaf(2, 2, 5, 4),)
            assert gradcheck(function, x) and gradgradcheck(function, x, fast_mode=True)


def names(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("through_ops", [True, False], ids=["operators", "plain"])
def test_no_graph_break_in_the_generator(generator, through_ops):
    seen: set[str] = set()

    def backend(module, inputs):
        seen.update(names(module.graph))
        return module.forward

    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.enable_grad() if not through_ops else registered():
        found = torch.compile(generator, backend=backend, fullgraph=True)(z)
        assert torch.equal(found, generator(z))
    assert any("psp_lightning" in name for name in seen) == through_ops, seen


@pytest.mark.slow
def test_compiled_gradients(generator):
    """Forward and backward are traced through the fake implementations."""
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    discriminator = Discriminator(16, 64, 8)

    def loss(z):
        return discriminator(generator(z)).sum()

    expected = torch.autograd.grad(loss(z), list(generator.parameters()))
    with registered():
        found = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(z), list(generator.parameters())
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("through_ops", [True, False], ids=["operators", "plain"])
def test_export_of_the_generator(generator, through_ops):
    generator.requires_grad_(False)
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with registered() if through_ops else torch.no_grad():
        program = torch.export.export(generator, (z,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        assert any("psp_lightning" in name for name in names(program.graph)) == through_ops
        five = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program.module()(five), generator(five))


def test_the_choice_can_be_traced(monkeypatch):
    """On CUDA, PSP_OPS is read while a graph is captured."""
    monkeypatch.setenv("PSP_OPS", "ref")
    torch._dynamo.reset()

    def function(x):
        return x + len(_dispatch.choice())

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [3, 3]


def test_autocast(generator):
    """The operators keep the bfloat16 of the convolutions before them; small factors stay in float32."""
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        expected = generator(z)
        with registered():
            found = generator(z)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    with registered():
        assert modconv_epilogue(x, None, bias=torch.ones(3)).dtype == torch.bfloat16
        # as in plain PyTorch, a bias of a wider dtype widens the result
        assert fused_leaky_relu(x, torch.ones(3)).dtype == torch.float32


def test_penalties_through_the_operators(generator):
    """R1 and path length, the second derivatives of generator training, agree with plain PyTorch."""
    discriminator = Discriminator(16, 64, 8)
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def penalties() -> tuple[torch.Tensor, ...]:
        w = generator.mapping(z)[:, None].repeat(1, generator.n_styles, 1)
        images = generator.synthesis(w)
        (slope,) = torch.autograd.grad((images * images.detach().sin()).sum(), w, create_graph=True)
        first = torch.autograd.grad(slope.square().sum(), list(generator.parameters()), allow_unused=True)
        real = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
        second = torch.autograd.grad(slope.square().sum(), list(discriminator.parameters()), allow_unused=True)
        return tuple(g for g in (*first, *second) if g is not None)

    expected = penalties()
    with registered():
        found = penalties()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_values_that_a_gpu_compares_agree_in_half_precision(half):
    """The test of test_gpu.py on the CPU, with the operators' plain forms: its bounds hold there."""
    expected = network_values(torch.device("cpu"), None)
    with registered():
        assert_networks_agree(network_values(torch.device("cpu"), half), expected, half)


def test_a_result_is_never_its_argument():
    x = torch.randn(2, 3, 4, 4)
    with registered():
        y = modconv_epilogue(x, negative_slope=1, gain=1)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("network", [lambda: Generator(16, style_dim=8, n_mapping=1), lambda: Discriminator(16, 64, 8)])
def test_a_network_made_under_inference_mode_uses_the_fused_filter(network, fake_kernels):
    """Built, copied and moved there, its filters are inference tensors, which the kernels' cache cannot hold."""

    def fused(net, x):
        fake_kernels.epilogues.clear()
        net(x)
        return [fy is not None for _, fy in fake_kernels.epilogues]

    with torch.inference_mode():
        net = copy.deepcopy(network()).to(torch.float64).to(torch.float32)
        x = torch.randn((1, 8) if isinstance(net, Generator) else (1, 3, 16, 16))
        found = fused(net, x)
    with torch.no_grad():
        assert found == fused(network(), x) and any(found)
    assert not [name for name, buffer in net.named_buffers() if name.endswith("kernel") and buffer.is_inference()]


def test_plain_path_is_used_on_the_cpu(monkeypatch):
    """No operator is called, so tracing, speed and derivatives are the same as for PyTorch's functions."""

    def refuse(*args, **kwargs):
        raise AssertionError("an operator was called")

    for name in ("epilogue", "upfirdn2d"):
        monkeypatch.setattr(torch.ops.psp_lightning, name, refuse)
    x = torch.randn(1, 2, 6, 6)
    upfirdn2d(x, fir_filter())
    fused_leaky_relu(x)
    modconv_epilogue(x, fir_filter(), (1, 2))

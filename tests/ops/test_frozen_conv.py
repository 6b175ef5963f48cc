"""Generators with constant weights: the same images and gradients as layer by layer, constants that are never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from psp_lightning.models import stylegan2
from psp_lightning.models.frozen import freeze
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops import fir_kernel
from psp_lightning.ops.cpu import winograd
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv, frozen_to_rgb

TOY = dict(output_size=32, style_dim=32, n_mapping=2, max_channels=16)


@pytest.fixture(params=["direct", "winograd"])
def generator(request, monkeypatch):
    if request.param == "winograd":  # also for few channels and tiles
        monkeypatch.setattr(winograd, "CHANNELS", 1)
        monkeypatch.setattr(winograd, "TILES", 1)
    net = Generator.seeded(0, **TOY)
    for layer in (net.conv1, *net.convs):
        layer.noise.weight.data.fill_(0.3)
        layer.activate.bias.data.normal_()
    return freeze(net)


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with the path that makes no use of constant weights."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(stylegan2, "is_constant", lambda layer: False)
            return function(*arguments)

    return call


def codes(batch=3, dtype=torch.float32):
    return torch.randn(batch, 8, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def with_gradient(net, w, noise="const"):
    w = w.clone().requires_grad_()
    torch.manual_seed(0)
    image = net.synthesis(w, noise)
    image.square().mean().backward()
    return image.detach(), w.grad


@pytest.mark.parametrize("noise", ["const", "random"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_image_and_gradient_equal_the_plain_path(generator, plainly, noise, channels_last, dtype, tolerance):
    generator.to(dtype)
    if channels_last:
        generator.to(memory_format=torch.channels_last)
    w = codes(dtype=dtype)
    actual, expected = with_gradient(generator, w, noise), plainly(with_gradient, generator, w, noise)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()
    assert all(p.grad is None for p in generator.parameters())


@torch.no_grad()
def test_the_same_with_and_without_gradients(generator):
    w = codes()
    with torch.enable_grad():
        image, _ = with_gradient(generator, w)
    assert torch.equal(image, generator.synthesis(w))
    with torch.inference_mode():
        assert torch.equal(image, generator.synthesis(w))


@torch.no_grad()
def test_bfloat16_stays_near(generator, plainly):
    """In 1/255: the bound of bf16 images, as wide as that of the plain path."""
    w, exact = codes(), generator.synthesis(codes())
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = generator.synthesis(w), plainly(generator.synthesis, w)
    scale = 127.5 / exact.abs().max()
    for image in (fast, plain):
        error = (image - exact).abs() * scale
        assert error.max() < 6 and error.mean() < 0.6, (float(error.max()), float(error.mean()))


def layer(up, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=source)

    source = torch.Generator().manual_seed(2)
    weight = draw(3, 2, 3, 3)
    energy = weight.square().sum((2, 3))
    side = 8 if up else 4
    constants = (weight.transpose(0, 1) if up else weight, energy, draw(2, 1, side, side), draw(3))
    blur = (fir_kernel(gain=4).to(dtype), (1, 1)) if up else (None, (0, 0))
    x, style = draw(2, 2, 4, 4).requires_grad_(), draw(2, 2).requires_grad_()
    return x, style, lambda x, style: frozen_styled_conv(x, style, *constants, *blur)


@pytest.mark.parametrize("up", [True, False])
def test_derivatives_of_first_and_second_order(up):
    x, style, function = layer(up)
    assert gradcheck(function, [x, style])
    assert gradgradcheck(function, [x, style])


@pytest.mark.parametrize("up", [True, False])
def test_one_input_alone_may_need_a_gradient(up):
    x, style, function = layer(up)
    both = torch.autograd.grad(function(x, style).square().sum(), (x, style))
    for only in (0, 1):
        inputs = [t if i == only else t.detach() for i, t in enumerate((x, style))]
        for again in (False, True):
            (one,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[only], create_graph=again)
            torch.testing.assert_close(one, both[only])


def test_function_transforms(generator):
    w = codes(1)
    expected = with_gradient(generator, w)[1]
    actual = torch.func.grad(lambda w: generator.synthesis(w).square().mean())(w)
    torch.testing.assert_close(actual, expected)


def test_to_rgb_in_both_orders():
    x, style, weight = torch.randn(2, 5, 4, 6), torch.randn(2, 5), torch.randn(3, 5, 1, 1)
    expected = torch.nn.functional.conv2d(x * style[:, :, None, None], weight)
    torch.testing.assert_close(frozen_to_rgb(x, style, weight), expected)
    last = frozen_to_rgb(x.contiguous(memory_format=torch.channels_last), style, weight)
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)


CHANGES = {
    "loaded": lambda net, other: net.load_state_dict(other.state_dict()),
    "assigned": lambda net, other: net.load_state_dict(other.state_dict(), assign=True),
    "in place": lambda net, other: [p.copy_(q) for p, q in zip(net.parameters(), other.parameters(), strict=True)],
    "within data": lambda net, other: [
        p.data.copy_(q) for p, q in zip(net.parameters(), other.parameters(), strict=True)
    ],
    "data": lambda net, other: [
        setattr(p, "data", q.data.clone()) for p, q in zip(net.parameters(), other.parameters(), strict=True)
    ],
}


@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_constants_follow_the_weights(generator, plainly, change):
    w, other = codes(), freeze(Generator.seeded(1, **TOY))
    other.noises.load_state_dict(generator.noises.state_dict())
    before = generator.synthesis(w)
    CHANGES[change](generator, other)
    after = generator.synthesis(w)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plainly(generator.synthesis, w), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_constants_follow_the_precision_and_are_not_saved(generator):
    w, keys = codes(), list(generator.state_dict())
    image, plain = generator.synthesis(w), len(pickle.dumps(Generator.seeded(0, **TOY)))
    assert list(generator.state_dict()) == keys
    assert len(pickle.dumps(generator)) < 1.3 * plain
    assert "_kept" not in copy.deepcopy(generator).conv1.conv.__dict__
    assert generator.double().synthesis(w.double()).dtype == torch.float64
    torch.testing.assert_close(generator.float().synthesis(w), image)


def test_constants_are_computed_once_and_serve_training_after_inference_mode(generator):
    conv = generator.convs[0].conv
    with torch.inference_mode():
        generator.synthesis(codes())
    first = conv.constants(torch.float32)
    with_gradient(generator, codes())
    assert conv.constants(torch.float32) is first


def test_a_generator_in_training_is_computed_layer_by_layer(generator, plainly):
    net = Generator.seeded(0, **TOY)
    w = codes()
    assert torch.equal(net.train().synthesis(w), plainly(net.synthesis, w))
    net.train().requires_grad_(False)  # as in the discriminator's half of a step
    assert torch.equal(net.synthesis(w), plainly(net.synthesis, w))
    net.requires_grad_(True).eval().synthesis(w).sum().backward()
    assert all(layer.conv.weight.grad is not None for layer in net.convs)


def kept(net, w):
    """Bytes that a call keeps for its derivative beyond parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.synthesis(w.clone().requires_grad_(), "random")
    return sum(size for pointer, size in found.items() if pointer not in own)


def test_less_than_half_of_the_memory_is_kept(generator, plainly):
    w = codes(8)
    assert kept(generator, w) < 0.5 * plainly(kept, generator, w)


def test_noise_that_needs_a_gradient_gets_one(generator):
    noise = [torch.randn(1, 1, s, s, requires_grad=True) for s in generator.noise_sides()]
    generator.synthesis(codes(), noise).sum().backward()
    assert all(n.grad is not None and n.grad.abs().max() > 0 for n in noise)

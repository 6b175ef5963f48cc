"""Frozen generators give the images and gradients of the plain layers, and their buffers follow the weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from psp_lightning.inference.frozen import (
    FrozenConv,
    FrozenStyledConv,
    autocast_dtype,
    freeze_generator,
    plain_generator,
)
from psp_lightning.models.layers import freeze
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator, ModulatedConv, StyledConv
from psp_lightning.ops import fir_filter
from psp_lightning.ops.cpu import winograd
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv, frozen_to_rgb

TOY = dict(output_size=32, style_dim=32, n_mapping=2, max_channels=16)
COPIES = {"copy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net))}


@pytest.fixture(params=["direct", "winograd"])
def plain(request, monkeypatch):
    if request.param == "winograd":  # use it even for few channels and tiles
        monkeypatch.setattr(winograd, "CHANNELS", 1)
        monkeypatch.setattr(winograd, "TILES", 1)
    net = Generator.seeded(0, **TOY)
    for layer in (net.conv1, *net.convs):
        layer.noise.weight.data.fill_(0.3)
        layer.activate.bias.data.normal_()
    return freeze(net)


@pytest.fixture
def frozen(plain):
    """Return the frozen form of `plain`, which shares its parameters."""
    return freeze_generator(plain)


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
def test_image_and_gradient_equal_the_plain_path(frozen, plain, noise, channels_last, dtype, tolerance):
    frozen.to(dtype)
    if channels_last:
        frozen.to(memory_format=torch.channels_last)
    w = codes(dtype=dtype)
    actual, expected = with_gradient(frozen, w, noise), with_gradient(plain, w, noise)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()
    assert all(p.grad is None for p in frozen.parameters())


@torch.no_grad()
def test_the_same_with_and_without_gradients(frozen):
    w = codes()
    with torch.enable_grad():
        image, _ = with_gradient(frozen, w)
    assert torch.equal(image, frozen.synthesis(w))
    with torch.inference_mode():
        assert torch.equal(image, frozen.synthesis(w))


@torch.no_grad()
def test_bfloat16_stays_close(plain):
    """The bound of bfloat16 images, in 1/255, is the same for the frozen form and the plain one."""
    w, exact = codes(), plain.synthesis(codes())
    with torch.autocast("cpu", torch.bfloat16):
        images = freeze_generator(plain, torch.bfloat16).synthesis(w), plain.synthesis(w)
    assert not torch.equal(*images), "the frozen form was not used"
    scale = 127.5 / exact.abs().max()
    for image in images:
        error = (image - exact).abs() * scale
        assert error.max() < 6 and error.mean() < 0.6, (float(error.max()), float(error.mean()))


@torch.no_grad()
def test_the_plain_layers_compute_every_dtype_but_the_chosen_one(plain):
    assert torch.equal(freeze_generator(plain, torch.bfloat16).synthesis(codes()), plain.synthesis(codes()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(freeze_generator(plain).synthesis(codes()), plain.synthesis(codes()))


def test_each_layer_has_the_dtype_of_its_resolution(plain):
    plain.use_half(16, torch.bfloat16)
    frozen = freeze_generator(plain)
    types = [layer.conv.prepared_weight.dtype for layer in (frozen.conv1, *frozen.convs)]
    assert types == [torch.float32] * 3 + [torch.bfloat16] * 4
    assert [layer.conv.prepared_weight.dtype for layer in frozen.to_rgbs] == [torch.float32] + [torch.bfloat16] * 2


def layer(up, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=source)

    source = torch.Generator().manual_seed(2)
    weight = draw(3, 2, 3, 3)
    weight_sq_sum = weight.square().sum((2, 3))
    side = 8 if up else 4
    constants = (weight.transpose(0, 1) if up else weight, weight_sq_sum, draw(2, 1, side, side), draw(3))
    fir = (fir_filter(gain=4).to(dtype), (1, 1)) if up else (None, (0, 0))
    x, style = draw(2, 2, 4, 4).requires_grad_(), draw(2, 2).requires_grad_()
    return x, style, lambda x, style: frozen_styled_conv(x, style, *constants, *fir)


@pytest.mark.parametrize("up", [True, False])
def test_derivatives_of_first_and_second_order(up):
    x, style, function = layer(up)
    assert gradcheck(function, [x, style])
    assert gradgradcheck(function, [x, style])


@pytest.mark.parametrize("up", [True, False])
def test_only_one_input_may_need_a_gradient(up):
    x, style, function = layer(up)
    both = torch.autograd.grad(function(x, style).square().sum(), (x, style))
    for only in (0, 1):
        inputs = [t if i == only else t.detach() for i, t in enumerate((x, style))]
        for again in (False, True):
            (one,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[only], create_graph=again)
            torch.testing.assert_close(one, both[only])


def test_function_transforms(frozen):
    w = codes(1)
    expected = with_gradient(frozen, w)[1]
    actual = torch.func.grad(lambda w: frozen.synthesis(w).square().mean())(w)
    torch.testing.assert_close(actual, expected)


def test_to_rgb_in_both_orders():
    x, style, weight = torch.randn(2, 5, 4, 6), torch.randn(2, 5), torch.randn(3, 5, 1, 1)
    expected = torch.nn.functional.conv2d(x * style[:, :, None, None], weight)
    torch.testing.assert_close(frozen_to_rgb(x, style, weight), expected)
    last = frozen_to_rgb(x.contiguous(memory_format=torch.channels_last), style, weight)
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)


# --- parameters and buffers of a frozen generator


def test_it_is_saved_like_the_plain_generator(frozen, plain, is_frozen):
    """Class, settings, state dict and parameters are the same; derived buffers are not saved."""
    assert type(frozen) is Generator and frozen.config == plain.config
    assert list(frozen.state_dict()) == list(plain.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(frozen.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert [id(p) for p in frozen.parameters()] == [id(p) for p in plain.parameters()], "they must share parameters"
    assert is_frozen(frozen) and all(isinstance(layer, FrozenStyledConv) for layer in (frozen.conv1, *frozen.convs))
    described = [PSP(nn.Identity(), net).generator for net in (frozen, plain)]
    assert [type(net).__name__ for net in described] == ["Generator"] * 2
    frozen.synthesis(codes())
    assert list(frozen.state_dict()) == list(plain.state_dict())
    derived = {name.rpartition(".")[2] for name, _ in frozen.named_buffers() if name not in frozen.state_dict()}
    assert derived == {"prepared_weight", "weight_sq_sum"} | ({"winograd_weight"} if winograd.CHANNELS == 1 else set())


CHANGES = {
    "loaded": lambda net, other: net.load_state_dict(other.state_dict()),
    "assigned": lambda net, other: net.load_state_dict(other.state_dict(), assign=True),
    "changed in place, then moved": lambda net, other: [
        [p.copy_(q) for p, q in zip(net.parameters(), other.parameters(), strict=True)], net.to("cpu")
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
@torch.no_grad()
def test_buffers_follow_the_weights(frozen, plain, change):
    w, other = codes(), freeze(Generator.seeded(1, **TOY))
    other.noises.load_state_dict(frozen.noises.state_dict())
    before = frozen.synthesis(w)
    CHANGES[change](frozen, other)
    after = frozen.synthesis(w)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, other.synthesis(w), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, freeze_generator(other).synthesis(w), atol=0, rtol=0)
    assert torch.equal(plain.synthesis(w), other.synthesis(w)), "the plain form must have the new weights too"


@torch.no_grad()
def test_buffers_follow_the_precision(frozen):
    w = codes()
    image = frozen.synthesis(w)
    assert frozen.double().synthesis(w.double()).dtype == torch.float64
    assert frozen.convs[0].conv.prepared_weight.dtype == frozen.convs[0].conv.weight_sq_sum.dtype == torch.float64
    torch.testing.assert_close(frozen.float().synthesis(w), image)


@pytest.mark.parametrize("remake", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_copies_are_independent(frozen, remake):
    w, image = codes(), frozen.synthesis(codes())
    other = remake(frozen)
    assert torch.equal(other.synthesis(w), image)
    other.load_state_dict(Generator.seeded(1, **TOY).state_dict())
    assert not torch.allclose(other.synthesis(w), image) and torch.equal(frozen.synthesis(w), image)
    assert torch.equal(plain_generator(other).convs[0].conv.weight, other.convs[0].conv.weight)


def test_a_pickle_contains_no_buffers(frozen):
    assert len(pickle.dumps(frozen)) < 1.3 * len(pickle.dumps(Generator.seeded(0, **TOY)))


def test_frozen_in_inference_mode_it_can_be_used_in_training(plain):
    with torch.inference_mode():
        frozen = freeze_generator(plain)
        image = frozen.synthesis(codes())
    assert torch.equal(with_gradient(frozen, codes())[0], image)


def test_the_plain_form_is_restored(frozen, plain, is_frozen):
    again = plain_generator(frozen)
    assert [type(layer) for layer in again.modules()] == [type(layer) for layer in plain.modules()]
    assert torch.equal(again.synthesis(codes()), plain.synthesis(codes())) and is_frozen(again)
    assert isinstance(frozen.conv1, FrozenStyledConv), "the frozen form must not change"
    again.requires_grad_(True).synthesis(codes()).sum().backward()
    assert all(layer.conv.weight.grad is not None for layer in again.convs)


def test_trained_or_replaced_weights_use_the_plain_layers(frozen, plain):
    other = {name: torch.randn_like(value) for name, value in plain.named_parameters()}

    def image(net):
        return torch.func.functional_call(net, other, (torch.zeros(2, net.z_dim),))

    torch.testing.assert_close(image(frozen), image(plain))
    frozen.requires_grad_(True).synthesis(codes()).sum().backward()
    lacking = [name for name, p in frozen.named_parameters() if p.grad is None and not name.startswith("style.")]
    assert not lacking, lacking


def test_a_hook_on_one_form_does_not_fire_on_the_other(plain):
    frozen, seen = freeze_generator(plain), []
    frozen.register_forward_hook(lambda *_: seen.append(1))
    plain(torch.zeros(1, plain.z_dim))
    assert not seen


def test_dtype_of_autocast():
    assert autocast_dtype("bf16-mixed", True) == autocast_dtype("16-mixed", True) == torch.bfloat16
    assert autocast_dtype("16-mixed", False) == torch.float16 and autocast_dtype("32-true", False) is None


def test_settings_of_the_frozen_form_are_kept_by_both_forms(frozen):
    frozen.use_half(16)
    assert freeze_generator(frozen).half_from == plain_generator(frozen).half_from == 16


def test_custom_layers_and_generators_are_only_frozen(is_frozen):
    class Own(StyledConv):
        def forward(self, x, w, noise, clamp=None):
            return super().forward(x, w, noise, clamp) * 2

    net, other = Generator.seeded(0, **TOY), nn.Linear(2, 2)
    net.conv1 = Own(16, 16, 32)
    assert type(freeze_generator(net).conv1) is Own
    assert freeze_generator(other) is other and is_frozen(other)


def test_a_captured_graph_contains_the_weights(frozen, plain):
    """It does not contain values derived from the weights, because tracing uses the plain layers."""
    convolutions = [layer for layer in frozen.modules() if isinstance(layer, ModulatedConv)]
    assert all(isinstance(layer, FrozenConv) for layer in convolutions)
    graphs = [torch.jit.trace(lambda w, n=net: n.synthesis(w), codes(), check_trace=False) for net in (frozen, plain)]
    assert [node.kind() for node in graphs[0].graph.nodes()] == [node.kind() for node in graphs[1].graph.nodes()]


def kept(net, w):
    """Return the bytes that a call keeps for its derivative, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.synthesis(w.clone().requires_grad_(), "random")
    return sum(size for pointer, size in found.items() if pointer not in own)


def test_less_than_half_of_the_memory_is_kept(frozen, plain):
    w = codes(8)
    assert kept(frozen, w) < 0.5 * kept(plain, w)


def test_noise_that_needs_a_gradient_gets_one(frozen):
    noise = [torch.randn(1, 1, s, s, requires_grad=True) for s in frozen.noise_sides()]
    frozen.synthesis(codes(), noise).sum().backward()
    assert all(n.grad is not None and n.grad.abs().max() > 0 for n in noise)

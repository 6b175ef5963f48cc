"""Models: sizes, noise, seeds, mixing, descriptions, wrong arguments."""

from __future__ import annotations

import pytest
import torch

from psp_lightning.models.checkpointing import checkpoint_units
from psp_lightning.models.encoders import EncoderIntoW, EncoderIntoWPlus, GradualStyleEncoder, ReStyleEncoder
from psp_lightning.models.irse import ArcFaceIRSE, IRSEBody, ResidualUnit, SqueezeExcite
from psp_lightning.models.psp import PSP
from psp_lightning.models.registry import ENCODERS, GENERATORS, register_encoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

TOY = dict(style_dim=32, n_mapping=2, max_channels=16)
SMALL = dict(style_dim=32, blocks=(1, 1, 1, 1), width=8)


def generator(size=32, seed=0):
    return Generator.seeded(seed, output_size=size, **TOY)


def network(encoder=None, size=32, **kwargs):
    encoder = encoder or GradualStyleEncoder(8, input_size=32, **SMALL)
    return PSP(encoder, generator(size), torch.linspace(-1, 1, 32), **kwargs).eval()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@torch.no_grad()
def test_generator_sizes(size):
    net = generator(size)
    assert net.n_styles == 2 * size.bit_length() - 4
    image = net.synthesis(torch.randn(2, net.n_styles, 32))
    assert image.shape == (2, 3, size, size) and image.isfinite().all()
    assert Generator(**net.config).config == net.config


def test_channel_table_is_the_published_one():
    with torch.device("meta"):
        for multiplier, expected in (
            (2, [512, 512, 512, 512, 512, 256, 128, 64, 32]),
            (1, [512] * 4 + [256, 128, 64, 32, 16]),
        ):
            net = Generator(1024, channel_multiplier=multiplier)
            widths = [net.conv1.activate.bias.shape[0]] + [c.activate.bias.shape[0] for c in net.convs[1::2]]
            assert widths == expected
        assert Generator(2048).convs[-1].activate.bias.shape == (16,)


@torch.no_grad()
def test_noise_modes():
    net = generator()
    for layer in (net.conv1, *net.convs):
        layer.noise.weight.fill_(0.5)
    w = torch.randn(2, 8, 32)
    const = net.synthesis(w)
    assert torch.equal(const, net.synthesis(w, "const"))
    stored = [getattr(net.noises, f"noise_{i}") for i in range(7)]
    assert torch.equal(const, net.synthesis(w, stored))
    torch.manual_seed(3)
    random = net.synthesis(w, "random")
    torch.manual_seed(3)
    sides = [4, 8, 8, 16, 16, 32, 32]
    drawn = [torch.empty(2, 1, s, s).normal_() for s in sides]  # the reference's order: layer by layer
    assert torch.equal(random, net.synthesis(w, drawn))
    assert not torch.allclose(random, const)
    for wrong, message in (
        (drawn[:3], "7 noise maps"),
        ("constant", "choose 'const'"),
        ([drawn[1]] * 7, r"noise\[0\]"),
    ):
        with pytest.raises(UserError, match=message):
            net.synthesis(w, wrong)


@torch.no_grad()
def test_one_w_for_all_layers_and_wrong_shapes():
    net = generator()
    w = torch.randn(2, 32)
    assert torch.equal(net.synthesis(w), net.synthesis(w[:, None].repeat(1, 8, 1)))
    for wrong in (torch.randn(2, 7, 32), torch.randn(2, 8, 31), torch.randn(2, 31)):
        with pytest.raises(UserError, match=r"\(B, 8, 32\)"):
            net.synthesis(wrong)
    with pytest.raises(UserError, match=r"\(B, 32\)"):
        net.mapping(torch.randn(2, 31))


@pytest.mark.parametrize("size", [0, 4, 48, -64])
def test_generator_size_must_be_a_power_of_two(size):
    with pytest.raises(UserError, match="power of two"):
        Generator(size)


def test_seeded_does_not_change_the_global_random_state():
    before = torch.get_rng_state()
    a, b, c = generator(seed=1), generator(seed=1), generator(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.input.input, c.input.input)


def test_latent_average():
    net = generator()
    before = torch.get_rng_state()
    average = net.latent_average(n=25_000, seed=1)
    assert torch.equal(before, torch.get_rng_state()) and average.shape == (32,) and not average.requires_grad
    assert torch.equal(average, net.latent_average(n=25_000, seed=1))
    z = torch.randn(25_000, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            net.latent_average(n=10_000, seed=1), net.mapping(z[:10_000]).mean(0), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(average, net.latent_average(n=25_000, seed=2), atol=0.05, rtol=0)


@torch.no_grad()
def test_truncation_bounds():
    net = generator()
    z, latent = torch.randn(2, 32), torch.randn(32)
    assert torch.equal(net(z), net.synthesis(net.mapping(z)))
    torch.testing.assert_close(net.truncate(net.mapping(z), latent, 0.0), latent.expand(2, -1))


def test_z_of_another_length():
    assert Generator(16, style_dim=32, z_dim=20, n_mapping=2, max_channels=8).mapping(torch.randn(3, 20)).shape == (
        3,
        32,
    )


@pytest.mark.parametrize("mode", ["ir", "ir_se"])
@pytest.mark.parametrize("depth, units", [(50, 24), (100, 49), (152, 50)])
def test_published_depths(mode, depth, units):
    with torch.device("meta"):
        body = IRSEBody(3, depth, mode)
        assert len(body.body) == units
        sides = [tuple(f.shape[1:]) for f in body.features(torch.empty(1, 3, 64, 64))]
    assert sides == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_backbone_arguments():
    for wrong, message in (
        (dict(n_layers=34), "50, 100, 152"),
        (dict(mode="se"), "ir, ir_se"),
        (dict(blocks=(1, 1)), "four positive counts"),
        (dict(blocks=(1, 0, 1, 1)), "four positive counts"),
    ):
        with pytest.raises(UserError, match=message):
            IRSEBody(**wrong)


@torch.no_grad()
def test_face_embedder_gives_unit_vectors():
    net = ArcFaceIRSE(input_size=32, blocks=(1, 1, 1, 1), width=8, embed_dim=24).eval()
    features = net(torch.randn(3, 3, 32, 32))
    assert features.shape == (3, 24)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    with pytest.raises(UserError, match="32, 32"):
        net(torch.randn(3, 3, 48, 48))
    with pytest.raises(UserError, match="multiple of 16"):
        ArcFaceIRSE(input_size=100)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("n_styles", [2, 6, 10, 18])
@torch.no_grad()
def test_gradual_encoder_scales(size, n_styles):
    net = GradualStyleEncoder(n_styles, in_channels=1, input_size=size, **SMALL).eval()
    assert net(torch.randn(2, 1, size, size)).shape == (2, n_styles, 32)


@pytest.mark.parametrize("cls", sorted(ENCODERS))
@torch.no_grad()
def test_every_encoder_rebuilds_from_its_config(cls):
    styles = {} if cls == "EncoderIntoW" else {"n_styles": 8}
    net = ENCODERS[cls](in_channels=4, input_size=32, **styles, **SMALL).eval()
    again = ENCODERS[cls](**net.config).eval()
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 4, 32, 32)
    image = [torch.randn(1, 3, 64, 64)] if net.iterations else []
    assert torch.equal(net(x, *image), again(x, *image)) and again.config == net.config
    assert net.in_channels == 4 and net.input_size == 32
    for wrong, message in (
        (torch.randn(1, 3, 32, 32), "4 channels, got 3"),
        (torch.randn(1, 4, 64, 32), "32x32 sources, got 64x32"),
        (torch.randn(4, 32, 32), "batch"),
    ):
        with pytest.raises(UserError, match=message):
            net(wrong, *image)


@pytest.mark.parametrize("cls", [GradualStyleEncoder, EncoderIntoWPlus, ReStyleEncoder])
def test_encoder_arguments(cls):
    for wrong, message in (
        (dict(n_styles=8, input_size=100), "power of two"),
        (dict(n_styles=0), "n_styles=0"),
        (dict(n_styles=8, in_channels=0), "in_channels=0"),
    ):
        with pytest.raises(UserError, match=message):
            cls(**wrong)


@torch.no_grad()
def test_encode_and_decode():
    net = network(source={"kind": "rgb", "size": 32})
    x = torch.randn(2, 3, 32, 32)
    delta, w_plus = net.encode_delta(x), net.encode(x)
    assert w_plus.shape == (2, 8, 32) and net.latent_avg.shape == (8, 32)
    torch.testing.assert_close(w_plus, delta + net.latent_avg)
    assert torch.equal(net(x), net.decode(w_plus)) and net(x).shape == (2, 3, 32, 32)
    plain = PSP(net.encoder, net.generator, net.latent_avg, start_from_latent_avg=False)
    assert torch.equal(plain.encode(x), delta)


@torch.no_grad()
def test_encoder_into_w_gives_the_same_style_everywhere():
    net = network(EncoderIntoW(input_size=32, **SMALL))
    delta = net.encode_delta(torch.randn(2, 3, 32, 32))
    assert delta.shape == (2, 8, 32) and torch.equal(delta, delta[:, :1].expand_as(delta))


def test_incompatible_parts():
    with pytest.raises(UserError, match="n_styles=6.*n_styles=8"):
        PSP(GradualStyleEncoder(6, input_size=32, **SMALL), generator())
    with pytest.raises(UserError, match="style_dim"):
        PSP(EncoderIntoW(style_dim=16, blocks=(1, 1, 1, 1), width=8), generator())
    with pytest.raises(UserError, match="latent_avg"):
        PSP(EncoderIntoW(input_size=32, **SMALL), generator(), torch.zeros(5, 32))


def test_mix_styles():
    net, w = network(), torch.randn(2, 8, 32)
    inject, kept = torch.randn(1, 32), w.clone()
    mixed = net.mix_styles(w, inject, [1, 4])
    assert torch.equal(w, kept), "the given codes must not change"
    assert torch.equal(mixed[:, [1, 4]], inject.expand(2, 2, 32)) and torch.equal(mixed[:, [0, 2, 3]], w[:, [0, 2, 3]])
    half = net.mix_styles(w, torch.ones(2, 8, 32), range(8), alpha=0.25)
    torch.testing.assert_close(half, 0.25 + 0.75 * w)
    assert net.mix_styles(w, None, [5])[:, 5].abs().max() == 0
    assert torch.equal(net.mix_styles(w, inject, []), w)
    for wrong in ([8], [-1]):
        with pytest.raises(UserError, match="styles from 0 to 7"):
            net.mix_styles(w, inject, wrong)
    with pytest.raises(UserError, match="does not match codes"):
        net.mix_styles(w, torch.randn(3, 32), [1])


def test_description_round_trip():
    net = network(source={"kind": "lowres", "size": 32, "factors": [2, 4]}, start_from_latent_avg=False)
    again = PSP.from_description(net.describe())
    again.load_state_dict(net.state_dict())
    assert again.describe() == net.describe() and again.source["factors"] == [2, 4]
    assert not again.start_from_latent_avg


def test_descriptions_that_are_wrong():
    good = network().describe()
    for wrong, message in (
        ({**good, "format": 9}, "format 9"),
        ([], "list"),
        (
            {**good, "encoder": {**good["encoder"], "class": "GradualStyleEncoderr"}},
            "Did you mean 'GradualStyleEncoder'",
        ),
        ({**good, "encoder": {"class": "os.system"}}, "Unknown encoder"),
        ({**good, "generator": None}, "lacks its generator"),
        ({**good, "generator": {**good["generator"], "depth": 3}}, "depth"),
        ({**good, "source": "rgb"}, "source"),
    ):
        with pytest.raises(UserError, match=message):
            PSP.from_description(wrong)


def test_registry_rejects_a_second_class_of_the_same_name():
    assert {"GradualStyleEncoder", "EncoderIntoW", "EncoderIntoWPlus"} <= set(ENCODERS) and "Generator" in GENERATORS
    other = type("GradualStyleEncoder", (torch.nn.Module,), {"__qualname__": "elsewhere.GradualStyleEncoder"})
    with pytest.raises(UserError, match="registered already"):
        register_encoder(other)


@torch.no_grad()
def test_channels_last_gives_the_same():
    net, x = network(), torch.randn(2, 3, 32, 32)
    expected = net(x)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_encoder_in_double_precision():
    net = network().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.encoder.parameters())
    assert all(p.grad is None for p in net.generator.parameters())


@torch.no_grad()
def test_bfloat16_autocast():
    net, x = network(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        image = net(x)
    assert image.isfinite().all() and (image.float() - net(x)).abs().mean() < 0.1 * net(x).abs().mean() + 0.05


@pytest.mark.slow
@torch.no_grad()
def test_full_size():
    net = PSP(GradualStyleEncoder(18), Generator(1024)).eval()
    image = net(torch.randn(1, 3, 256, 256))
    assert image.shape == (1, 3, 1024, 1024) and image.isfinite().all()


def train_step(encoder, x):
    """Return the gradients of a step, the state dict after it, and the bytes kept for the backward pass."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = encoder(x).square().sum()
    loss.backward()
    return [p.grad for p in encoder.parameters()], encoder.state_dict(), sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cls", [GradualStyleEncoder, EncoderIntoW])
def test_checkpointing_gives_the_same_with_less_memory(cls, autocast):
    x, found = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    for again in (False, True):
        torch.manual_seed(0)
        styles = {"n_styles": 8} if cls is GradualStyleEncoder else {}
        encoder = cls(**styles, input_size=64, style_dim=8, blocks=(1, 2, 1, 1), width=8).train()
        if again:
            checkpoint_units(encoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(train_step(encoder, x))
        assert all(m.momentum == 0.1 for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    (grads, state, kept), (grads_again, state_again, kept_again) = found
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert all(torch.equal(value, state_again[key]) for key, value in state.items()), "a batch was counted twice"
    assert int(state["input_layer.1.num_batches_tracked"]) == int(state["body.0.res_layer.0.num_batches_tracked"]) == 1
    assert kept_again < 0.6 * kept, (kept_again, kept)


def test_checkpointing_of_several_backward_passes_and_frozen_parts():
    x, found = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for again in (False, True):
        torch.manual_seed(0)
        unit = ResidualUnit(4, 8, 2, True)
        unit.shortcut_layer.requires_grad_(False)
        unit.res_layer[0].momentum = None  # a cumulative average
        if again:
            checkpoint_units(unit)
        for _ in range(3):
            loss = unit(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        found.append([*unit.state_dict().values(), *[p.grad for p in unit.parameters() if p.grad is not None]])
        assert int(unit.shortcut_layer[1].num_batches_tracked) == 3 and unit.res_layer[0].momentum is None
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_needs_units():
    with pytest.raises(UserError, match="checkpointing=false"):
        checkpoint_units(torch.nn.Linear(2, 2))


def test_squeeze_of_large_maps_in_half_precision_is_finite():
    layer = SqueezeExcite(16).half()
    assert layer(torch.full((1, 16, 128, 128), 5.0).half()).isfinite().all()

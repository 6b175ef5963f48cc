"""LitGenerator: the arithmetic of a step's parts, rejected settings, the content of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psp_lightning.lit.callbacks.samples import sample_images, tile
from psp_lightning.lit.generator import LitGenerator, Recipe
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError


class OneProcess:
    """A stand-in for the trainer of one process."""

    global_rank, world_size, global_step = 0, 1, 0


def build(width: int = 8, size: int = 16, **options: Any) -> LitGenerator:
    torch.manual_seed(0)
    generator = Generator(size, style_dim=8, n_mapping=2, channel_multiplier=1, channel_base=64, max_channels=width)
    recipe = Recipe(**options.pop("recipe", {}))
    return LitGenerator(generator, Discriminator(size, 64, width), recipe=recipe, **options)


@pytest.fixture
def trainer() -> OneProcess:
    return OneProcess()


def attached(module: LitGenerator, trainer: Any) -> LitGenerator:
    module._trainer = trainer
    return module


# --- averaged weights


def test_average_starts_as_the_generator_and_stays_frozen(is_frozen) -> None:
    module = build()
    module.train()
    assert is_frozen(module.g_ema) and module.generator.training
    for name, tensor in module.generator.state_dict().items():
        assert torch.equal(tensor, module.g_ema.state_dict()[name])


def test_average_has_the_stated_half_life() -> None:
    """The average of a weight that jumps from 0 to 1 is 0.5 after ema_images images."""
    module = build(recipe={"ema_images": 100.0, "ema_ramp": 0.0})
    with torch.no_grad():
        for mine, weight in zip(module.g_ema.parameters(), module.generator.parameters(), strict=True):
            mine.zero_()
            weight.fill_(1)
    for _ in range(10):
        module._update_ema(10)
    assert all(torch.allclose(p, torch.tensor(0.5), atol=1e-5) for p in module.g_ema.parameters())


@pytest.mark.parametrize(("shown", "half_life"), [(1_000, 50.0), (10**9, 312.5 * 16)])
def test_half_life_of_the_average_ramps_up(shown: int, half_life: float) -> None:
    module = build()
    module.images_shown.fill_(shown)
    with torch.no_grad():
        next(module.g_ema.parameters()).zero_()
        next(module.generator.parameters()).fill_(1)
    module._update_ema(16)
    moved = next(module.g_ema.parameters()).flatten()[0].item()
    assert moved == pytest.approx(1 - 0.5 ** (16 / half_life), rel=1e-3)


def test_images_are_counted_beyond_what_float32_can() -> None:
    module = build()
    module.images_shown.fill_(2**24)
    module.images_shown += 1
    assert int(module.images_shown) == 2**24 + 1


# --- adaptive augmentation


@pytest.mark.parametrize(("scores", "expected"), [(1.0, 0.5 + 0.032), (-1.0, 0.5 - 0.032)])
def test_ada_follows_the_sign(scores: float, expected: float, trainer: OneProcess) -> None:
    module = attached(build(recipe={"augment_p": 0.5, "ada_images": 1000}), trainer)
    for step in range(4):
        module._step = step
        module._adapt(torch.full((8,), scores), 8)
        assert float(module.augment_p) == pytest.approx(0.5 if step < 3 else expected)
    assert module._sign == scores and float(module.sign_count) == 0


def test_ada_uses_all_scores_since_the_last_change(trainer: OneProcess) -> None:
    module = attached(build(recipe={"augment_p": 0.5, "ada_target": 0.5}), trainer)
    for step, sign in enumerate((1.0, 1.0, 1.0, -1.0)):
        module._step = step
        module._adapt(torch.full((8,), sign), 8)
    assert module._sign == 0.5


@pytest.mark.parametrize("scores", [1.0, -1.0])
def test_p_stays_a_probability(scores: float, trainer: OneProcess) -> None:
    module = attached(build(recipe={"augment_p": 0.5, "ada_images": 10}), trainer)
    module._step = 3
    module._adapt(torch.full((8,), scores), 8)
    assert float(module.augment_p) == (1.0 if scores > 0 else 0.0)


# --- styles


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_style_mixing(mixing: float, trainer: OneProcess) -> None:
    module = attached(build(size=32, recipe={"mixing": mixing}), trainer)
    w_plus = module.styles(2000, module.draws(0))
    assert w_plus.shape == (2000, 8, 8)
    changes = (w_plus[:, 1:] != w_plus[:, :-1]).any(-1)
    assert changes.sum(1).max() <= 1, "an image has more than two styles"
    share = changes.any(1).float().mean().item()
    assert share == pytest.approx(mixing, abs=0.04)
    if mixing == 1:
        each = changes.float().mean(0)
        assert (each - 1 / 7).abs().max() < 0.04, f"crossovers are not uniform: {each.tolist()}"


def test_ranks_generate_the_images_of_one_process() -> None:
    whole = attached(build(), type("T", (OneProcess,), {})())
    expected = render(whole, 4)
    for rank in (0, 1):
        part = attached(build(), type("T", (OneProcess,), {"global_rank": rank, "world_size": 2})())
        torch.testing.assert_close(render(part, 2), expected[rank::2], atol=1e-5, rtol=0)


def render(module: LitGenerator, n: int) -> Tensor:
    draws = module.draws(0)
    return module.render(module.styles(n, draws), draws)


# --- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalties_on_a_cpu_are_those_of_full_precision(dtype: torch.dtype, trainer: OneProcess) -> None:
    """They are bit-identical, however the processor computes half precision. All other passes use half precision."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def penalties(module: LitGenerator) -> dict[str, Tensor]:
        found = {}
        for network, step in (
            (module.generator, lambda sgd: module._path_step(2, sgd)),
            (module.discriminator, lambda sgd: module._r1_step(images, sgd)),
        ):
            module._train_only(network)
            found |= step(torch.optim.SGD(network.parameters(), lr=0.0))
            found |= {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        return found

    full, half = (attached(build(), trainer) for _ in range(2))
    for network in (half.generator, half.discriminator):
        network.use_half(8, dtype)
    before = set(half.state_dict())
    expected, found = penalties(full), penalties(half)
    assert len(found) > 20 and found.keys() == expected.keys() and set(half.state_dict()) == before
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert half.generator.half_from == half.discriminator.half_from == 8
    scores = [module.discriminator(images) for module in (full, half)]
    assert not torch.equal(*scores), "the discriminator's pass did not use half precision"


def test_full_precision_ends_with_its_block() -> None:
    network = build().discriminator
    network.use_half(8, torch.float16)
    with pytest.raises(KeyError), network.full_precision():
        assert not network.is_half(16)
        raise KeyError
    assert network.is_half(16) and network.half_dtype == torch.float16


# --- optimizers


def test_lazy_regularisation_corrects_the_optimizers() -> None:
    """StyleGAN2, appendix B: learning rate times c, betas to the power of c, c = k / (k + 1)."""
    first, second = build(lr=0.01).configure_optimizers()
    assert first.defaults["lr"] == pytest.approx(0.01 * 4 / 5) and second.defaults["lr"] == pytest.approx(
        0.01 * 16 / 17
    )
    assert first.defaults["betas"] == pytest.approx((0, 0.99 ** (4 / 5)))
    assert second.defaults["betas"] == pytest.approx((0, 0.99 ** (16 / 17)))
    plain, _ = build(lr=0.01, recipe={"path_every": 0}).configure_optimizers()
    assert plain.defaults["lr"] == 0.01 and plain.defaults["betas"] == (0.0, 0.99)


def test_published_defaults() -> None:
    recipe = Recipe()
    assert (recipe.r1_every, recipe.path_every, recipe.path_weight, recipe.path_decay) == (16, 4, 2.0, 0.01)
    assert (recipe.mixing, recipe.ada_target, recipe.ada_images, recipe.ada_every) == (0.9, 0.6, 500_000, 4)


# --- rejected settings and weights


def test_networks_of_two_sizes() -> None:
    generator = Generator(16, style_dim=8, n_mapping=1, max_channels=4)
    with pytest.raises(UserError, match="makes 16 px images, the discriminator takes 32"):
        LitGenerator(generator, Discriminator(32, 64, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "adda"}, "augment=adda is unknown. Did you mean 'ada'"),
        ({"ada_every": 0}, "ada_every"),
        ({"path_shrink": 0}, "path_shrink"),
    ],
)
def test_invalid_recipes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe(**options)


@pytest.mark.filterwarnings("error")  # a warning of PyTorch before the error would be confusing
def test_a_value_that_is_not_finite_is_named() -> None:
    module = build()
    batch = {"path": ["a.png", "b.png"]}
    module._refuse_non_finite({"loss_g": torch.tensor(1.0)}, batch)
    loss = torch.tensor(float("nan"), requires_grad=True) * 1
    with pytest.raises(UserError, match=r"'loss_d' became nan at step 1\. Files of the batch: a\.png, b\.png"):
        module._refuse_non_finite({"loss_g": torch.tensor(1.0), "loss_d": loss}, batch)


def test_weights_of_another_network() -> None:
    with pytest.raises(UserError, match="do not match network"):
        build(width=8).load_state_dict(build(width=4).state_dict())


def test_weights_without_counters() -> None:
    source, module = build(), build()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    source.images_shown += 100
    module.load_weights(source.state_dict())
    assert int(module.images_shown) == 0
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), source.parameters(), strict=True))


def test_values_repeated_in_the_log_survive_a_checkpoint() -> None:
    source, module = build(), build()
    source._row, source._sign = {"r1": torch.tensor(0.3)}, 0.25
    checkpoint: dict[str, Any] = {}
    source.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    assert torch.equal(module._row["r1"], torch.tensor(0.3)) and module._sign == 0.25
    assert checkpoint["generator"] == source.generator.config
    module.on_load_checkpoint({})  # from a version that did not store it


def test_weights_that_are_not_finite_replace_no_checkpoint() -> None:
    module = build()
    with torch.no_grad():
        module.discriminator.score.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"'discriminator\.score\.bias' are not finite after step 1; no checkpoint"):
        module.on_save_checkpoint({})


# --- samples


def test_samples_are_always_the_same() -> None:
    generator = build().g_ema
    first = sample_images(generator, 5, batch=2)
    assert first.shape == (5, 3, 16, 16)
    torch.rand(3)
    torch.testing.assert_close(sample_images(generator, 5), first)
    centre = sample_images(generator, 5, psi=0.0)
    torch.testing.assert_close(centre, centre[:1].expand_as(centre))


def test_tiles() -> None:
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 0.5, 1.5, -0.5)])
    grid = tile(images, 3)
    assert grid.shape == (3, 4, 6)
    assert grid[0, ::2, ::2].tolist() == [[-1.0, 0.0, 0.5], [1.0, -0.5, 1.0]]


def test_a_checkpoint_without_weights_is_not_treated_as_a_run(tmp_path: Path) -> None:
    from psp_lightning.build.generator_training import _start_from

    torch.save({"generator": {}}, file := tmp_path / "half.ckpt")
    with pytest.raises(UserError, match=r"half\.ckpt"):
        _start_from(build(), str(file))


def test_a_checkpoint_of_another_command_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psp_lightning.build import generator_training
    from psp_lightning.checkpoints import read as reading

    module, other, read = build(), build(), []
    with torch.no_grad():
        other.generator.input["input"].fill_(2.0)
    torch.save({"g_ema": other.generator.state_dict()}, file := tmp_path / "other.ckpt")
    real = reading.read_torch
    monkeypatch.setattr(reading, "read_torch", lambda *arguments: read.append(arguments[0]) or real(*arguments))
    generator_training._start_from(module, str(file))
    assert read == [file] and bool((module.g_ema.input["input"] == 2).all())

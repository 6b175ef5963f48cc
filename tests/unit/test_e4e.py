"""Training as e4e published it: gradients, stages, discriminator, pools, checkpoints, wrong settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from psp_lightning import PSP
from psp_lightning.lit.callbacks import LastCheckpoint
from psp_lightning.lit.e4e import E4E, CodePool, LatentCritic
from psp_lightning.lit.rng import StepRNG
from psp_lightning.models.encoders import Encoder4Editing, GradualStyleEncoder, ReStyleEncoder, ReStyleEncoder4Editing
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.utils.errors import UserError
from tests.unit.published_steps import FAST, SIZE, Published, Watch, check_gradients, check_resume, fit, module, network


def test_e4e_has_the_published_gradients(tmp_path: Path) -> None:
    """Twelve steps: all stages of eight styles, R1 in every third step, pools that are full after the second."""
    recipe = {**FAST, "every": 1, "r1_every": 3}
    lit = module(network(), recipe)
    reference, watch = Published(copy.deepcopy(lit.net), lit.critic, recipe), Watch()
    fit(lit, tmp_path, 12, watch)
    for step, (y, state, found) in enumerate(zip(watch.batches, watch.states, watch.gradients, strict=True)):
        reference.net.encoder.load_state_dict(state)
        reference.step(y, step)
        check_gradients(found, reference.net.encoder, step, zeros=False)
        heads = {int(name.split(".")[1]) for name in found if name.startswith("styles.")}
        assert heads == set(range(1 + reference.stage(step))), f"step {step}: heads without gradients must have none"
    linear = [layer for layer in lit.critic.network.modules() if isinstance(layer, nn.Linear)]
    found_weights = [p for layer in linear for p in (layer.weight, layer.bias)]
    for a, b in zip(found_weights, reference.weights, strict=True):
        assert (a - b).abs().max() <= 1e-5, "the discriminator differs"


def test_the_published_values_are_the_defaults() -> None:
    expected = E4E(20_000, 2_000, 2e-4, 0.1, 2e-5, 10, 16, 50)
    assert E4E() == expected
    critic = LatentCritic(E4E(), 512)
    layers = [(m.in_features, m.out_features) for m in critic.network.modules() if isinstance(m, nn.Linear)]
    assert layers == [(512, 512)] * 3 + [(512, 1)]
    group = critic.optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (2e-5, (0.9, 0.999))


def test_stages() -> None:
    recipe = E4E(start=20_000, every=2_000)
    steps = {0: 0, 19_999: 0, 20_000: 1, 21_999: 1, 22_000: 2, 51_999: 16, 52_000: 17, 10**6: 17}
    assert {step: recipe.differences(step, 18) for step in steps} == steps
    assert recipe.differences(10**6, 8) == 7


@pytest.mark.parametrize("cls", [Encoder4Editing, ReStyleEncoder4Editing])
def test_encoder_with_fewer_differences(cls: type) -> None:
    net = network(cls).eval()
    x = [torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 3, SIZE, SIZE)][: 1 + (cls is ReStyleEncoder4Editing)]
    whole = net.encoder(*x)
    assert net.encoder.differences == 7 and "differences" not in net.encoder.config
    for n in (0, 2, 3, 6, 7):
        net.encoder.differences = n
        codes = net.encoder(*x)
        assert codes.shape == whole.shape and torch.equal(codes[:, : n + 1], whole[:, : n + 1])
        assert torch.equal(codes[:, n + 1 :], codes[:, :1].expand(-1, 7 - n, -1))
        again = PSP.from_description(net.describe()).eval()
        again.load_state_dict(net.state_dict())
        assert again.encoder.differences == n and torch.equal(again.encoder(*x), codes)
        fast = net.for_inference().encoder(*x)
        assert (fast - codes).abs().max() <= 1e-4 * codes.abs().max()
    for wrong in (-1, 8, 1.5, "2"):
        with pytest.raises(UserError, match=rf"{cls.__name__} differences={wrong}: .* from 0 to 7"):
            net.encoder.differences = wrong


def test_pool() -> None:
    pool, draws = CodePool(2), torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.4, 0.0], [0.6, 0.0], [0.6, 0.99], [0.6, 0.0]])
    found = pool.exchange(torch.arange(6.0)[:, None], draws)
    # 0 and 1 fill it; 2 is returned; 3 replaces 0, 4 replaces 1, 5 replaces 3
    assert found.flatten().tolist() == [0, 1, 2, 0, 1, 3]
    assert [float(code) for code in pool.codes] == [5, 4]
    empty, codes = CodePool(0), torch.rand(3, 1)
    assert empty.exchange(codes, torch.rand(3, 2)) is codes and not empty.codes
    pool, many = CodePool(50), torch.arange(1000.0)[:, None]
    kept = pool.exchange(many, StepRNG(0, 0, 0).uniform(1000, 2)) == many
    assert kept[:50].all() and 0.45 < kept[50:].float().mean() < 0.55


def test_validation_has_only_the_losses_of_psp() -> None:
    lit = module(network(), FAST)
    lit.eval()
    batch = {"target": torch.rand(2, 3, SIZE, SIZE) * 2 - 1}
    total, values, _ = lit.evaluate(batch, "const")
    assert set(values) == {"l2"} and torch.equal(total, values["l2"]) and lit.critic.steps == 0


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_bit_exact(tmp_path: Path, stop: int) -> None:
    """The run is cut in the middle of a stage and at its end; the pools are full by then."""
    recipe = {**FAST, "r1_every": 5}
    keys = ("e4e", "state_dict", "optimizer_states", "random_state", "psp")
    whole = check_resume(lambda **options: module(network(), recipe, **options), tmp_path, stop, 7, keys)
    assert len(whole["e4e"]["fake_pool"]) == len(whole["e4e"]["real_pool"]) == 3 and whole["e4e"]["steps"] == 7
    net = PSP.from_checkpoint(tmp_path / "whole" / "last.ckpt")
    assert net.encoder.differences == 3, "the step that starts with 6 finished ones trains three differences"
    codes = net.encode(torch.rand(1, 3, SIZE, SIZE))
    assert torch.equal(codes[:, 4:] - net.latent_avg[4:], (codes[:, :1] - net.latent_avg[:1]).expand(-1, 4, -1))


def test_a_checkpoint_of_another_training(tmp_path: Path) -> None:
    fit(module(network()), tmp_path, 1, LastCheckpoint(tmp_path, None))
    with pytest.raises(UserError, match="no discriminator.*Start a new run"):
        fit(module(network(), FAST), tmp_path, 2, resume=tmp_path / "last.ckpt")


def test_without_a_discriminator(tmp_path: Path) -> None:
    lit = module(network(), {**FAST, "adversarial_weight": 0})
    fit(lit, tmp_path, 2)
    assert lit.critic.steps == 0


def test_a_run_that_is_too_short_for_its_stages(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="last difference is trained from step 15 on.*editability.start"):
        fit(module(network(), FAST), tmp_path, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": -1}, "start=-1 must be a whole number, at least 0"),
        ({"every": 0}, "every=0 must be a whole number, at least 1"),
        ({"pool": 1.5}, "pool=1.5 must be a whole number"),
        ({"delta_weight": -1}, "delta_weight=-1 must be a number, at least 0"),
        ({"r1_gamma": float("nan")}, "r1_gamma=nan must be a number"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        E4E(**options)


def test_wrong_networks() -> None:
    with pytest.raises(UserError, match="GradualStyleEncoder does not. Choose encoder=e4e"):
        module(network(GradualStyleEncoder), FAST)
    with pytest.raises(UserError, match=r"loss_per_pass=True needs an encoder of several passes.*Encoder4Editing has"):
        module(network(), loss_per_pass=True)
    for cls, options in ((Encoder4Editing, {"recipe": FAST}), (ReStyleEncoder, {"loss_per_pass": True})):
        net = network(cls)
        net.refiner = FeatureRefiner(16, net.generator.feature_channels[16], SIZE, width=8, blocks=1)
        with pytest.raises(UserError, match="cannot train a refiner"):
            module(net, **options)

"""Inversion in two steps: optimisation in four spaces, the refiner, their combinations, and files of refinements."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psp_lightning.build.inversion import Distance
from psp_lightning.checkpoints.safetensors_io import save_described
from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.inference.frozen import freeze_psp_generator, plain_generator
from psp_lightning.inference.invert import Inverter, Optimization, keep_codes, refine_features
from psp_lightning.inference.optimize import Optimizer
from psp_lightning.latents.refinements import read_refinement, save_refinement
from psp_lightning.lit.prediction import LitPredictor
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.psp import PSP
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.arguments import ArgumentError
from psp_lightning.utils.errors import UserError

SPACES = ("w_plus", "w", "features", "weights")


class MSE(nn.Module):
    """The sum over images of the mean squared error."""

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return (y_hat - y).square().mean((1, 2, 3)).sum()


def error(y_hat: Tensor, y: Tensor) -> float:
    return float(MSE()(y_hat, y))


@pytest.fixture(scope="module")
def net() -> PSP:
    torch.manual_seed(0)
    made = Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    refiner = FeatureRefiner(16, 12, 32, width=16, blocks=1)
    nn.init.normal_(refiner.change.weight, std=0.1)
    found = PSP(encoder, made, made.latent_average(n=64), source={"kind": "rgb", "size": 32}, refiner=refiner)
    return freeze_psp_generator(found.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def optimizer(space: str = "w_plus", steps: int = 8, **more: Any) -> Optimizer:
    return Optimizer(MSE(), space, steps=steps, **more)


# --- optimisation


@pytest.mark.parametrize("space", SPACES)
def test_optimisation_comes_closer(net: PSP, x: Tensor, space: str) -> None:
    start = Inversion(net.encode(x))
    found = optimizer(space)(net, start, x)
    assert error(net.decode(found), x) < 0.97 * error(net.decode(start), x)
    assert not found.w_plus.requires_grad and (found.features is None or not found.features.requires_grad)
    assert (found.features is not None) == (space == "features") and (found.weights is not None) == (space == "weights")
    if space in ("features", "weights"):
        assert torch.equal(found.w_plus, start.w_plus), "the codes are the pivot"
    if space == "w":
        assert torch.equal(found.w_plus, found.w_plus[:, :1].expand_as(found.w_plus))


@pytest.mark.parametrize("space", SPACES)
def test_an_image_does_not_depend_on_its_batch(net: PSP, x: Tensor, space: str) -> None:
    start = Inversion(net.encode(x))
    both = net.decode(optimizer(space, 4)(net, start, x))
    for i in range(2):
        alone = net.decode(optimizer(space, 4)(net, start[i], x[i : i + 1]))
        assert torch.allclose(both[i : i + 1], alone, atol=1e-4), f"image {i}"


def test_the_losses_of_a_batch_are_a_sum(x: Tensor) -> None:
    """With a mean, the gradient of an image would depend on the number of images."""
    distance = Distance(CompositeLoss({"l2": L2Loss()}, {"l2": 0.5}))
    y = x.flip(0)
    expected = 0.5 * (x - y).square().mean((1, 2, 3)).sum()
    assert distance(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_an_inversion_is_a_sequence(net: PSP, x: Tensor) -> None:
    found = optimizer("weights", 1)(net, net.invert(x), x)
    assert [len(part) for part in found] == [1, 1]
    assert torch.equal(found[-1].w_plus, found.w_plus[1:]) and found[-1].weights == found.weights[1:]  # type: ignore[index]
    with pytest.raises(IndexError):
        found[2]


def test_interpolation(net: PSP, x: Tensor) -> None:
    """The ends are the two inversions; the middle is the mean of codes, features and weights."""
    first = net.invert(x)
    second = step("weights")(net, Inversion(net.encode(x.flip(0))), x, x.flip(0))
    for alpha, expected in ((0.0, first), (1.0, second)):
        torch.testing.assert_close(net.decode(first.interpolate(second, alpha)), net.decode(expected))
    middle = first.interpolate(second, 0.5)
    torch.testing.assert_close(middle.w_plus, (first.w_plus + second.w_plus) / 2)
    torch.testing.assert_close(middle.features, first.features / 2)
    name = next(iter(second.weights[0]))
    torch.testing.assert_close(middle.weights[1][name], second.weights[1][name] / 2)
    plain = Inversion(first.w_plus).interpolate(Inversion(second.w_plus), 0.25)
    assert plain.features is None and plain.weights is None
    with pytest.raises(UserError, match=r"codes have the shapes \(2, 8, 16\) and \(1, 8, 16\)"):
        first.interpolate(second[0], 0.5)
    with pytest.raises(UserError, match="features have the shapes"):
        first.interpolate(Inversion(first.w_plus, torch.zeros(2, 12, 8, 8)), 0.5)


def test_the_codes_of_an_inversion_are_injected(net: PSP, x: Tensor) -> None:
    first, second = net.invert(x), net.invert(x.flip(0))
    mixed = net.mix_styles(first, second, [2, 3])
    assert torch.equal(mixed.w_plus, net.mix_styles(first.w_plus, second.w_plus, [2, 3]))
    assert mixed.features is first.features


def test_tuning_leaves_the_shared_generator_untouched(net: PSP, x: Tensor) -> None:
    before = {name: value.clone() for name, value in net.generator.state_dict().items()}
    first = net.decode(net.encode(x))
    found = optimizer("weights", 3)(net, Inversion(net.encode(x)), x)
    after = net.generator.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(net.decode(net.encode(x)), first)
    assert not any(parameter.requires_grad for parameter in net.generator.parameters())
    assert found.weights is not None and not any(name.startswith("style.") for name in found.weights[0])


def test_the_locality_term_keeps_other_images(net: PSP, x: Tensor) -> None:
    start = Inversion(net.encode(x[:1]))
    draws = torch.Generator().manual_seed(5)  # other codes than those of the term
    other = Inversion(torch.cat([Optimizer._near(net.generator, start.w_plus, draws) for _ in range(4)]))
    moved = []
    for locality in (0.0, 10.0):
        weights = optimizer("weights", 40, locality=locality, lr=0.003)(net, start, x[:1]).weights
        assert weights is not None
        changed = Inversion(other.w_plus, weights=weights * 4)
        moved.append(error(net.decode(changed), net.decode(other)))
    assert moved[1] < 0.4 * moved[0], moved


def test_gradients_of_the_feature_map() -> None:
    made = Generator.seeded(0, output_size=16, style_dim=8, n_mapping=1, max_channels=4).double()
    net = PSP(nn.Identity(), made)
    codes = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = torch.zeros(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda features: net.decode(Inversion(codes, features)), change)


@pytest.mark.parametrize("start", ["encoder", "average", "features"])
def test_starts(net: PSP, x: Tensor, start: str) -> None:
    given = net.invert(x)
    found = optimizer("w_plus", 1, start=start, lr=1e-12)(net, given, x)
    expected = net.latent_avg.expand_as(given.w_plus) if start == "average" else given.w_plus
    assert torch.allclose(found.w_plus, expected, atol=1e-6)
    assert (found.features is not None) == (start == "features")


def test_a_time_budget_ends_the_optimisation(net: PSP, x: Tensor) -> None:
    steps: list[tuple[int, int]] = []
    method = optimizer("w_plus", 100_000, seconds=0.3)
    method.on_step = lambda done, total: steps.append((done, total))
    found = method(net, Inversion(net.encode(x)), x)
    assert 0 < len(steps) < 100_000 and found.w_plus.isfinite().all()


@pytest.mark.parametrize("space", SPACES)
def test_the_shortest_budget_allows_one_step(net: PSP, x: Tensor, space: str) -> None:
    start = Inversion(net.encode(x[:1]))
    found = optimizer(space, 100, seconds=1e-9)(net, start, x[:1])
    assert not torch.equal(net.decode(found), net.decode(start))


@pytest.mark.parametrize("space", SPACES)
def test_inversions_from_inference_mode(net: PSP, x: Tensor, space: str) -> None:
    with torch.inference_mode():
        start = net.invert(x)
    assert optimizer(space, 1)(net, start, x).w_plus.isfinite().all()


def test_features_in_half_precision_are_optimised_in_float32(net: PSP, x: Tensor) -> None:
    start = net.invert(x)
    assert start.features is not None
    start = Inversion(start.w_plus, start.features.bfloat16())
    found = optimizer("features", 1, start="features")(net, start, x)
    assert found.features is not None and found.features.dtype == torch.float32


def test_steps_are_reported(net: PSP, x: Tensor) -> None:
    for space in ("w_plus", "weights"):
        steps: list[tuple[int, int]] = []
        method = optimizer(space, 2)
        method.on_step = lambda done, total, steps=steps: steps.append((done, total))
        method(net, Inversion(net.encode(x)), x)
        total = 2 if space == "w_plus" else 4
        assert steps == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"space": "z"}, "space=z is unknown"),
        ({"start": "random"}, "start=random is unknown"),
        ({"seconds": 0}, "must be more than 0"),
        ({"seconds": -1}, "seconds=-1"),
        ({"steps": 0}, "steps=0"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": 0}, "lr=0 must be more than 0"),
        ({"locality": "much"}, "locality=much"),
        ({"locality": 0.1}, "locality=0.1 has no effect with space=w_plus, only with space=weights"),
        ({"space": "weights", "resolution": 16}, "resolution=16 has no effect with space=weights"),
    ],
)
def test_invalid_arguments(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Optimizer(MSE(), **more)


def test_what_does_not_fit(net: PSP, x: Tensor) -> None:
    codes = Inversion(net.encode(x))
    with pytest.raises(ArgumentError, match=r"resolution=64 must be one of the generator's: 4, 8, 16, 32"):
        optimizer("features", resolution=64)(net, codes, x)
    with pytest.raises(ArgumentError, match=r"resolution=8 must be the refiner's, 16"):
        optimizer("features", resolution=8, start="features")(net, net.invert(x), x)
    with pytest.raises(UserError, match="Some values of the codes are not finite"):
        optimizer("w_plus")(net, Inversion(codes.w_plus * float("nan")), x)
    generator = nn.Identity()  # stands in for a generator of the user's that has no maps
    generator.output_size = 32  # type: ignore[assignment]
    with pytest.raises(UserError, match="needs a generator with feature maps; Identity has none"):
        optimizer("features").side(SimpleNamespace(generator=generator, refiner=None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not finite"):
        optimizer()(net, codes, torch.full_like(x, torch.nan))
    for images in (x[0], x[:1], x[:, :1]):
        with pytest.raises(UserError, match=r"it must be \(2, 3, S, S\)"):
            optimizer()(net, codes, images)
    with pytest.raises(UserError, match="as net.invert returns for a network with a refiner"):
        optimizer(start="features")(net, codes, x)
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        optimizer()(net, codes, x)
    with pytest.raises(UserError, match="features for 1 of 2 images"):
        net.decode(Inversion(codes.w_plus, torch.zeros(1, 12, 16, 16)))
    with pytest.raises(UserError, match="weights for 1 of 2 images"):
        net.decode(Inversion(codes.w_plus, weights=({},)))
    with pytest.raises(UserError, match="changes the weight conv9 of shape"):
        net.decode(Inversion(codes.w_plus, weights=({"conv9": torch.zeros(1)},) * 2))
    with pytest.raises(UserError, match=r"features of shape \(2, 12, 64, 64\)"):
        net.decode(Inversion(codes.w_plus, torch.zeros(2, 12, 64, 64)))


# --- embed and refine


def step(space: str, start: str = "encoder") -> Optimization:
    return Optimization(MSE(), partial(Optimizer, space=space, start=start, steps=2))


EMBED = {"encoder": lambda: None, "optimised": lambda: step("w_plus", "average"), "one style": lambda: step("w")}
REFINE = {
    "none": lambda: keep_codes, "refiner": lambda: refine_features, "codes": lambda: step("w_plus"),
    "features": lambda: step("features"), "refiner, then features": lambda: step("features", "features"),
    "weights": lambda: step("weights"), "refiner, then weights": lambda: step("weights", "features"),
}  # fmt: skip


@pytest.mark.parametrize(("embed", "refine"), list(itertools.product(EMBED, REFINE)))
def test_every_combination(net: PSP, x: Tensor, embed: str, refine: str, tmp_path: Path) -> None:
    """Each of them decodes, mixes and is the same after it was stored."""
    inverter = Inverter(EMBED[embed](), REFINE[refine]())
    inverter.check(net)
    found = inverter(net, x, x)
    image = net.decode(found)
    assert image.shape == (2, 3, 32, 32) and bool(image.isfinite().all())
    mixed = net.decode(net.mix_styles(found, net.latent_avg[None], [6, 7]))
    assert not torch.equal(mixed, image) and bool(mixed.isfinite().all())
    if found.features is None and found.weights is None:
        return
    digest = generator_hash(net.generator)
    for i in range(2):
        save_refinement(tmp_path / f"{i}.safetensors", found[i], digest)
        file = tmp_path / f"{i}.safetensors"
        features, weights = read_refinement(file, net.generator, digest, found.w_plus[i])
        assert (features is None, weights is None) == (found.features is None, found.weights is None)
        read = Inversion(
            found[i].w_plus, None if features is None else features[None], None if weights is None else (weights,)
        )
        difference = (net.decode(read) - image[i : i + 1]).clamp(-1, 1).abs().max()
        assert difference < 2 / 255, f"image {i} differs by {difference * 127.5:.2f} levels"
        without = (net.decode(found[i].w_plus) - image[i : i + 1]).clamp(-1, 1).abs().max()
        assert without > 4 / 255, "the codes alone give another image"


def test_the_second_step_starts_from_the_first(net: PSP, x: Tensor) -> None:
    first = step("w_plus", "average")(net, Inversion(net.encode(x)), x, x)
    second = Inverter(step("w_plus", "average"), refine_features)(net, x, x)
    assert torch.equal(first.w_plus, second.w_plus) and second.features is not None
    assert torch.equal(second.features, net.refine(x, first.w_plus))


def test_a_generator_is_enough_from_the_average(net: PSP, x: Tensor) -> None:
    alone = PSP(nn.Identity(), net.generator, net.latent_avg)
    inverter = Inverter(step("w_plus", "average"), keep_codes)
    assert not inverter.needs_encoder and Inverter(step("w"), keep_codes).needs_encoder
    assert torch.equal(inverter(alone, x, x).w_plus, inverter(net, x, x).w_plus)
    for refine in (refine_features, partial(refine_features), step("weights", "features")):
        with pytest.raises(UserError, match="this network has no refiner"):
            Inverter(None, refine).check(alone)


# --- files


def test_files_are_checked(net: PSP, x: Tensor, tmp_path: Path) -> None:
    digest, path = generator_hash(net.generator), tmp_path / "0.safetensors"
    with pytest.raises(UserError, match=r"does not exist, but .* refine=none"):
        read_refinement(path, net.generator, digest, None)
    found = net.invert(x)
    save_refinement(path, found[0], "another")
    with pytest.raises(UserError, match="belongs to another generator"):
        read_refinement(path, net.generator, digest, None)
    with pytest.raises(UserError, match="written with another code"):
        read_refinement(path, net.generator, None, found.w_plus[1])
    features, _ = read_refinement(path, net.generator, None, found.w_plus[0])
    assert features is not None and path.stat().st_size < 2 * features.numel() + 1000, "16 bits for each number"
    with pytest.raises(UserError, match="too large for float16. Set latents=false"):
        save_refinement(path, Inversion(net.latent_avg[None], torch.full((1, 12, 16, 16), 1e6)), digest)
    for wrong, message in (
        (Inversion(net.latent_avg[None], torch.zeros(1, 12, 64, 64)), r"features of shape \(12, 64, 64\)"),
        (Inversion(net.latent_avg[None], weights=({"conv9": torch.ones(1)},)), "changes the weight conv9"),
        (Inversion(net.latent_avg[None]), "neither features nor weights"),
    ):
        save_refinement(path, wrong, digest)
        with pytest.raises(UserError, match=message):
            read_refinement(path, net.generator, digest, None)
    facts = {"generator": {"sha256": digest}}
    for broken in (torch.tensor(1.0), torch.zeros(12, 16, 16, dtype=torch.int32)):
        save_described(path, "refinement", {"features": broken}, facts, None)
        with pytest.raises(UserError, match="is damaged: its values must be"):
            read_refinement(path, net.generator, digest, None)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        read_refinement(path, net.generator, None, None)


# --- other forms of the network


@pytest.mark.slow
def test_captured_for_compilation(net: PSP, x: Tensor) -> None:
    """torch.compile captures the refiner, the map that it reads and the change of the map in two graphs."""
    plain = PSP(net.encoder, plain_generator(net.generator), net.latent_avg, source=net.source, refiner=net.refiner)
    module = LitPredictor(plain.eval(), Inverter())
    invert, decode = (
        torch.compile(part, backend="aot_eager", fullgraph=True) for part in (module.invert, module.decode)
    )
    with torch.no_grad():
        w_plus, features = invert(x)
        expected = net.invert(x)
        assert torch.allclose(features, expected.features, atol=1e-4)
        assert torch.allclose(decode(w_plus, features), net.decode(expected), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("space", SPACES)
def test_on_a_gpu(net: PSP, x: Tensor, space: str) -> None:
    """Every space is optimised and decoded through the CUDA kernels as on the CPU."""
    expected = optimizer(space, 8)(net, Inversion(net.encode(x)), x)
    there, y = copy.deepcopy(net).cuda(), x.cuda()
    found = optimizer(space, 8)(there, Inversion(there.encode(y)), y)
    assert error(there.decode(found), y) == pytest.approx(error(net.decode(expected), x), rel=0.02)

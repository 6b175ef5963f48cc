"""Feature maps of the generator that are read and changed, and the refiner that learns to change one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from psp_lightning.checkpoints.weight_files import save_psp
from psp_lightning.cli.resume import refuse_changes
from psp_lightning.inference.frozen import freeze_generator
from psp_lightning.lit.edits import Edit, draw_edits
from psp_lightning.lit.psp import LitPSP
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.layers import freeze
from psp_lightning.models.psp import PSP
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError
from tests.unit import published_steps

RGB = {"kind": "rgb", "size": 32}


def generator(**more: Any) -> Generator:
    return Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12, **more)


def network(refined: bool = True, resolution: int = 16, **more: Any) -> PSP:
    torch.manual_seed(0)
    made = generator()
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    refiner = FeatureRefiner(resolution, 12, 32, width=16, blocks=1) if refined else None
    return PSP(encoder, made, made.latent_average(n=64), source=RGB, refiner=refiner, **more).eval()


def trained_a_little(net: PSP) -> PSP:
    """Return the network with a change that is not zero."""
    assert net.refiner is not None
    torch.manual_seed(3)
    torch.nn.init.normal_(net.refiner.change.weight, std=0.1)
    return net


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def codes(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 8, 16, generator=torch.Generator().manual_seed(2))


# --- feature maps in the synthesis


@pytest.mark.parametrize("frozen", [False, True])
def test_maps_are_read_at_every_resolution(frozen: bool) -> None:
    net = freeze_generator(generator()) if frozen else generator()
    seen: dict[int, tuple[int, ...]] = {}

    def read(resolution: int, features: torch.Tensor) -> torch.Tensor:
        seen[resolution] = tuple(features.shape)
        return features

    with torch.no_grad():
        assert torch.equal(net.synthesis(codes(), features=read), net.synthesis(codes()))
    assert seen == {side: (2, channels, side, side) for side, channels in net.feature_channels.items()}
    assert list(seen) == [4, 8, 16, 32]


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_a_changed_map_changes_only_what_follows(side: int) -> None:
    net = generator()
    before: dict[int, torch.Tensor] = {}
    after: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        plain = net.synthesis(codes(), features=lambda r, m: before.setdefault(r, m))
        changed = net.synthesis(codes(), features=lambda r, m: after.setdefault(r, m + 1 if r == side else m))
    assert [torch.equal(before[r], after[r]) for r in before] == [r < side for r in before]
    assert not torch.equal(changed, plain)


def test_gradients_with_respect_to_a_map() -> None:
    net = freeze(generator().double())
    shapes = {side: (1, channels, side, side) for side, channels in net.feature_channels.items()}
    torch.manual_seed(0)
    for side in (4, 16):
        change = (0.1 * torch.randn(shapes[side], dtype=torch.float64)).requires_grad_()
        direction = torch.randn(1, 3, 32, 32, dtype=torch.float64)

        def value(change: torch.Tensor, side: int = side, direction: torch.Tensor = direction) -> torch.Tensor:
            image = net.synthesis(codes(1).double(), features=lambda r, m: m + change if r == side else m)
            return (image * direction).sum()

        (gradient,) = torch.autograd.grad(value(change), change)
        step = torch.randn_like(change)
        difference = (value(change + 1e-6 * step) - value(change - 1e-6 * step)) / 2e-6
        assert float((gradient * step).sum()) == pytest.approx(float(difference.detach()), rel=1e-6)


class Count(TorchDispatchMode):
    """Count the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_reading_adds_no_operation_and_a_change_one() -> None:
    net, w_plus, change, counts = generator(), codes(), torch.zeros(2, 12, 16, 16), []
    for features in (None, lambda r, m: m, lambda r, m: m + change if r == 16 else m):
        with Count() as count:
            net.synthesis(w_plus, features=features)
        counts.append(count.operations)
    assert counts[0] == counts[1] and len(counts[2]) == len(counts[0]) + 1
    if torch.__version__.startswith("2.15"):  # counted before the maps could be read; depends on PyTorch's version
        assert len(counts[0]) == 248


@torch.no_grad()
def test_reading_adds_no_node_to_an_exported_graph() -> None:
    net = generator().requires_grad_(False)
    nodes = []
    for features in (None, lambda r, m: m):
        traced = torch.jit.trace(lambda w, f=features: net.synthesis(w, features=f), codes(), check_trace=False)
        nodes.append([node.kind() for node in traced.graph.nodes()])
    assert nodes[0] == nodes[1] and len(nodes[0]) > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_in_half_precision(dtype: torch.dtype) -> None:
    net = generator()
    net.use_half(16, dtype)
    inversion = Inversion(codes(), 0.1 * torch.ones(2, 12, 16, 16))
    wrapped = PSP(torch.nn.Identity(), net)
    with torch.no_grad():
        image = wrapped.decode(inversion)
        exact = PSP(torch.nn.Identity(), generator()).decode(inversion)
    assert image.dtype == torch.float32 and float((image - exact).abs().max()) < 0.1 * float(exact.abs().max())


# --- the network with a refiner


@torch.no_grad()
def test_an_untrained_refiner_changes_nothing(x: torch.Tensor) -> None:
    plain, refined = network(refined=False), network()
    assert torch.equal(refined(x), plain(x))
    inversion = refined.invert(x)
    assert inversion.features is not None and inversion.features.shape == (2, 12, 16, 16)
    assert not inversion.features.any()
    assert plain.invert(x).features is None and torch.equal(plain.decode(plain.invert(x)), plain(x))


@torch.no_grad()
def test_a_trained_refiner(x: torch.Tensor) -> None:
    net = trained_a_little(network())
    inversion = net.invert(x)
    assert not torch.equal(net(x), net.decode(inversion.w_plus))
    mixed = net.mix_styles(inversion, torch.zeros(1, 16), [6, 7])
    assert mixed.features is inversion.features
    assert torch.equal(mixed.w_plus, net.mix_styles(inversion.w_plus, torch.zeros(1, 16), [6, 7]))
    one = net.invert(x[:1])
    assert one.features is not None
    torch.testing.assert_close(one.features, inversion.features[:1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_refiner_under_autocast(x: torch.Tensor) -> None:
    net = trained_a_little(network())
    exact = net.invert(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.invert(x)
        image = net.decode(found)
    assert exact.features is not None and found.features is not None
    for mine, theirs in ((found.features, exact.features), (image, net.decode(exact))):
        assert float((mine - theirs).abs().max()) < 0.05 * float(theirs.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("refined", [False, True])
def test_files_with_and_without_a_refiner(refined: bool, x: torch.Tensor, tmp_path: Path) -> None:
    net = trained_a_little(network()) if refined else network(refined=False)
    save_psp(tmp_path / "net.safetensors", net)
    torch.save(
        {"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}},
        tmp_path / "net.ckpt",
    )
    for name in ("net.safetensors", "net.ckpt"):
        again = PSP.from_checkpoint(tmp_path / name)
        assert (again.refiner is not None) == refined
        torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_description_and_fast_form(x: torch.Tensor) -> None:
    net = trained_a_little(network())
    again = PSP.from_description(net.describe())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x), net(x))
    assert "refiner" not in network(refined=False).describe()
    torch.testing.assert_close(net.for_inference()(x), net(x), rtol=1e-3, atol=1e-3)


def test_a_refiner_that_does_not_fit() -> None:
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    with pytest.raises(UserError, match="13 channels at 16 px, but the generator has 12 at 4, 12 at 8"):
        PSP(encoder, generator(), refiner=FeatureRefiner(16, 13, 32, width=8))
    with pytest.raises(UserError, match="belongs to another generator"):
        PSP(encoder, generator(), refiner=FeatureRefiner(64, 12, 64, width=8))
    with pytest.raises(UserError, match="takes sources of 64 px, but the encoder takes 32 px"):
        PSP(encoder, generator(), refiner=FeatureRefiner(16, 12, 64, width=8))
    sketches = GradualStyleEncoder(8, style_dim=16, input_size=32, in_channels=1, blocks=(1, 1, 1, 1), width=4)
    with pytest.raises(UserError, match="the source has 1 channels"):
        PSP(sketches, generator(), refiner=FeatureRefiner(16, 12, 32, width=8))
    with pytest.raises(UserError, match=r"features of shape \(2, 5, 16, 16\), but this generator has 12 channels"):
        network().decode(Inversion(codes(), torch.zeros(2, 5, 16, 16)))
    for wrong, message in (
        ({"resolution": 12}, "resolution=12: it must be a power of two"),
        ({"resolution": 64}, "at most input_size=32"),
        ({"width": 0}, "width=0"),
        ({"blocks": 0}, "blocks=0"),
    ):
        with pytest.raises(UserError, match=message):
            FeatureRefiner(**{"resolution": 16, "channels": 12, "input_size": 32, **wrong})


# --- training


def lit(net: PSP, **more: Any) -> LitPSP:
    losses = CompositeLoss({"l2": L2Loss()}, {"l2": 1.0})
    return LitPSP(
        net,
        losses,
        lambda parameters: torch.optim.Adam(parameters, lr=4e-4),
        noise="const",
        source_is_target=True,
        **more,
    )


def test_a_refiner_halves_the_error() -> None:
    """Targets are images of the generator with another map, which no codes can express."""
    net = network()
    freeze(net.encoder)
    torch.manual_seed(5)
    with torch.no_grad():
        w_plus = net.latent_avg + 0.5 * torch.randn(4, 8, 16)
        target = net.decode(Inversion(w_plus, torch.randn(4, 12, 16, 16)))
        target = target / target.abs().max()
    module = lit(net)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(100):
        loss, _, _ = module.evaluate({"target": target}, "const")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])


def test_only_what_is_not_frozen_is_trained() -> None:
    net = network()
    freeze(net.encoder)
    module = lit(net)
    module.train()
    assert not net.encoder.training and net.refiner is not None and net.refiner.training
    (group,) = module.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in net.refiner.parameters()}
    both = network()
    (group,) = lit(both).configure_optimizers().param_groups
    assert len(group["params"]) == len([*both.encoder.parameters(), *both.refiner.parameters()])  # type: ignore[union-attr]


def test_a_resume_keeps_the_refiners_settings(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("refiner: {edit_share: 0.25}\ncallbacks: {last: {_target_: x}}\n")
    now = OmegaConf.create({"refiner": {"edit_share": 0.5}, "callbacks": {"last": {"_target_": "x"}}, "resume": "r"})
    with pytest.raises(UserError, match="resume= cannot change refiner.edit_share: 0.25 -> 0.5"):
        refuse_changes(tmp_path, now)


# --- edits


def test_an_edit_replaces_styles_or_adds_a_direction() -> None:
    net = network()
    torch.manual_seed(0)
    images, edited, edit = draw_edits(net.generator, net.latent_avg, 16)
    assert images.shape == edited.shape == (16, 3, 32, 32) and float(images.abs().max()) <= 1
    w_plus = codes(16)
    changed = edit(w_plus)
    replaced = edit.replaced.flatten(1).any(1)
    assert 0 < int(replaced.sum()) < 16
    for i in range(16):
        if replaced[i]:
            first = int(edit.replaced[i].flatten().nonzero()[0])
            assert first >= 3 and torch.equal(changed[i, :first], w_plus[i, :first])
            assert torch.equal(changed[i, first:], edit.styles[i, first:])
        else:
            torch.testing.assert_close(changed[i] - w_plus[i], edit.direction[i])


def test_edits_are_a_share_of_a_training_batch(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the batch is unchanged, and a known code has its edited image as target."""
    net = network()
    seen: dict[str, Any] = {}
    original = net.decode

    def decode(inversion: Any, noise: Any = "const") -> torch.Tensor:
        seen["w_plus"] = inversion.w_plus
        return original(inversion, noise)

    module = lit(net, edit_share=0.5).eval()
    drawn = torch.ones(1, 3, 32, 32)
    edit = Edit(torch.ones(1, 8, 1, dtype=torch.bool), torch.full((1, 8, 16), 7.0), torch.ones(1, 8, 16))
    monkeypatch.setattr("psp_lightning.lit.psp.draw_edits", lambda *_: (drawn, -drawn, edit))
    refine = net.refine
    monkeypatch.setattr(net, "refine", lambda source, w: seen.update(source=source) or refine(source, w))
    monkeypatch.setattr(net, "decode", decode)
    total, _, y_hat = module.evaluate({"target": x}, "const", edits=1)
    with torch.no_grad():
        plain = net.encode(x[:1])
    torch.testing.assert_close(seen["w_plus"][0], plain[0])
    assert bool((seen["w_plus"][1] == 8).all())
    assert torch.equal(seen["source"], torch.cat([x[:1], drawn])), "the refiner sees the unedited image"
    expected = torch.cat([x[:1], -drawn])
    error = (y_hat - expected).square().mean()
    assert float(total.detach()) == pytest.approx(float(error.detach()), rel=1e-5)


@pytest.mark.parametrize(("share", "n", "edits"), [(0.5, 4, 2), (0.9, 2, 1), (0.25, 2, 1), (0.25, 8, 2), (0, 1, 0)])
def test_number_of_edits_in_a_training_step(share: float, n: int, edits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = lit(network(), edit_share=share), []

    def evaluate(batch: Any, noise: Any, number: int = 0) -> None:
        seen.append(number)
        raise InterruptedError

    monkeypatch.setattr(module, "evaluate", evaluate)
    with pytest.raises(InterruptedError):
        module.training_step({"target": torch.zeros(n, 3, 32, 32)}, 0)
    assert seen == [edits]


def test_generated_samples_keep_their_place(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits replace images: the codes of generated samples are compared with the known ones."""
    module, seen = lit(network(), edit_share=0.5), {}
    monkeypatch.setattr(module, "objective", lambda inputs: seen.update(inputs=inputs) or (inputs.y_hat.sum(), {}))
    batch = {"target": x, "codes": torch.stack([torch.zeros(8, 16), torch.ones(8, 16)])}
    module.evaluate(batch | {"generated": torch.tensor([0.0, 1.0])}, "const", edits=1)
    assert seen["inputs"].generated.tolist() == [0, 1]
    assert torch.equal(seen["inputs"].y[1], x[1]) and not torch.equal(seen["inputs"].y[0], x[0])


@pytest.mark.parametrize(
    ("share", "n", "generated", "edits"), [(0.5, 1, 0, None), (0.5, 4, 2, None), (0.25, 4, 4, 1), (0.25, 4, 2, 1)]
)
def test_edits_leave_an_image(share: float, n: int, generated: int, edits: int | None) -> None:
    module = lit(network(), edit_share=share)
    batch = {"target": torch.zeros(n, 3, 32, 32), "generated": (torch.arange(n) >= n - generated).float()}
    if edits is None:
        with pytest.raises(UserError, match="edits would replace all images of a batch, which has"):
            module.training_step(batch, 0)
    else:
        assert module._count_edits(batch, 0) == edits


def test_the_last_batch_of_an_epoch_may_be_one_image() -> None:
    assert lit(network(), edit_share=0.25)._count_edits({"target": torch.zeros(1, 3, 32, 32)}, 1) == 0


def test_random_noise_of_an_edit_is_the_same_on_both_sides(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = network(), []
    for name, weight in net.generator.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.constant_(weight, 0.5)
    module = lit(net, edit_share=0.5).eval()
    encoded = net.encode_delta

    def encode_delta(source: torch.Tensor) -> torch.Tensor:
        """Return the right code of the edited image."""
        return torch.cat([encoded(source[:1]), seen[0] - net.latent_avg])

    def synthesis(w: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(w)
        return Generator.synthesis(net.generator, w, *arguments, **options)

    monkeypatch.setattr(net, "encode_delta", encode_delta)
    monkeypatch.setattr(net.generator, "synthesis", synthesis)
    monkeypatch.setattr(module, "objective", lambda inputs: (inputs.y_hat.sum(), {"y": inputs.y}))
    _, values, y_hat = module.evaluate({"target": x}, "random", edits=1)
    torch.testing.assert_close(y_hat[1].clamp(-1, 1), values["y"][1], rtol=0, atol=1e-5)
    constant = net.decode(seen[1]).clamp(-1, 1)
    assert not torch.allclose(values["y"][1], constant[0], atol=1e-3), "the noise is random"


def test_random_noise_needs_its_sizes(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lit(network(), edit_share=0.5)
    monkeypatch.delattr(Generator, "noise_sides")
    with pytest.raises(UserError, match=r"model.noise=random: Generator has no noise_sides.*Use model.noise=const"):
        module.evaluate({"target": x}, "random", edits=1)


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    """Steps 3 and 4 draw other edits and noise than steps 1 and 2."""

    def make(**options: Any) -> LitPSP:
        return published_steps.module(network(), edit_share=0.5, **options)

    keys = ("state_dict", "optimizer_states", "random_state", "psp")
    published_steps.check_resume(make, tmp_path, 2, 4, keys)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_edit_share_is_a_share(share: float) -> None:
    with pytest.raises(UserError, match="edit_share"):
        lit(network(), edit_share=share)
    with pytest.raises(UserError, match="needs a refiner"):
        lit(network(refined=False), edit_share=0.5)

"""Generated samples: their seeds, their place in the batches of one and of several ranks, their images and codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from psp_lightning.data.datamodules import InversionDataModule, Sketch2FaceDataModule
from psp_lightning.data.generated import GeneratedSamples, generated_per_batch
from psp_lightning.data.loader import EpochSampler, MixedSampler
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.lit.generated import Drawing, with_drawn
from psp_lightning.lit.psp import LitPSP
from psp_lightning.losses import CompositeLoss, L2Loss, LatentLoss, LossInputs
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

EIGHT = list(range(100, 108))


def generator() -> Generator:
    made = Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
    for name, weight in made.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.constant_(weight, 0.5)
    return made


def average(made: Generator) -> torch.Tensor:
    return made.latent_average(n=64).expand(made.n_styles, -1)


def data(share: float, n: int = 10, batch_size: int = 4, **more: Any) -> InversionDataModule:
    train, val = (ToyFacesStore(size=32, seed=seed, n=n) for seed in (1, 2))
    options = {"input_size": 32, "target_size": 32, "batch_size": batch_size, "generated_share": share} | more
    return InversionDataModule(train if share < 1 else None, val if share < 1 else None, **options)


# --- how many


@pytest.mark.parametrize(
    ("share", "batch_size", "n"), [(0, 8, 0), (0.0, 3, 0), (0.25, 8, 2), (0.7, 10, 7), (0.1, 10, 1), (1, 3, 3)]
)
def test_number_of_generated_samples(share: float, batch_size: int, n: int) -> None:
    assert generated_per_batch(share, batch_size) == n


@pytest.mark.parametrize(
    ("share", "batch_size", "message"),
    [
        (0.3, 8, r"generated_share=0.3 is 2.4 samples of a batch of 8.*Choose 0.25 or 0.375"),
        (0.1, 4, r"is 0.4 samples.*Choose 0.25, or"),
        (0.9, 4, r"is 3.6 samples.*Choose 0.75, or"),
        (0.5, 1, r"is 0.5 samples.*Choose a larger batch_size"),
        (1.5, 8, r"from 0 to 1"),
        (-0.5, 8, r"from 0 to 1"),
        (True, 8, r"must be a number"),
    ],
)
def test_a_share_that_does_not_fit(share: Any, batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(share, batch_size=batch_size)


def test_a_share_needs_images_and_inversion() -> None:
    store = ToyFacesStore(size=32, n=3)
    with pytest.raises(UserError, match="generated_share=0.5 needs images"):
        InversionDataModule(None, store, generated_share=0.5)
    with pytest.raises(UserError, match="generated_share=0.0 needs images"):
        InversionDataModule(store, None)
    with pytest.raises(UserError, match="needs task=inversion.*task=sketch2face"):
        Sketch2FaceDataModule(store, store, generated_share=0.5)
    with pytest.raises(UserError, match="generated_limit=0"):
        data(1, generated_limit=0)


# --- seeds


def seeds(samples: GeneratedSamples, epoch: int = 0, n: int = 20) -> list[int]:
    return [samples[(epoch, index)]["seed"] for index in range(n)]


def test_a_seed_depends_on_epoch_index_and_part() -> None:
    def made(**more: Any) -> GeneratedSamples:
        return GeneratedSamples(None, 20, 32, 32, **more)

    parts = [seeds(made()), seeds(made(), epoch=1), seeds(made(seed=1)), seeds(made(train=False))]
    assert len(set(sum(parts, []))) == 80 and min(sum(parts, [])) >= 0
    assert seeds(made()) == parts[0]
    for same in (made(fixed=True), made(train=False)):
        assert seeds(same, epoch=3) == seeds(same)


# --- batches


def read(module: InversionDataModule, epochs: int = 1) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    return [batch for _ in range(epochs) for batch in loader]


def test_mixed_batches_are_full_and_have_every_image_once() -> None:
    batches = read(data(0.5), 2)
    assert len(batches) == 10
    for batch in batches:
        assert batch["source"].shape == batch["target"].shape == (2, 3, 32, 32)
        assert len(batch["path"]) == len(batch["index"]) == 4 and len(batch["seeds"]) == 2
        assert [path.startswith("generated") for path in batch["path"]] == [False, False, True, True]
    for epoch in (batches[:5], batches[5:]):
        assert sorted(torch.cat([batch["index"][:2] for batch in epoch]).tolist()) == list(range(10))
    assert len({seed for batch in batches for seed in batch["seeds"]}) == 20


def test_batches_without_images() -> None:
    module = data(1, input_size=16, generated_limit=10)
    module.setup("fit")
    batches = read(module, 2)
    assert [len(batch["seeds"]) for batch in batches] == [4, 4, 2] * 2
    assert batches[0]["source"].shape == (0, 3, 16, 16) and batches[0]["target"].shape == (0, 3, 32, 32)
    assert len({seed for batch in batches for seed in batch["seeds"]}) == 10, "with a limit, epochs are equal"
    assert not module.has_images("train") and not module.has_images("val")
    assert len(data(1).train_dataloader()) == 2500


def test_validation_has_fixed_samples_that_training_has_not() -> None:
    first, second = ([seed for batch in data(1).val_dataloader() for seed in batch["seeds"]] for _ in range(2))
    assert first == second and len(set(first)) == 64
    assert not set(first) & {seed for batch in read(data(1, batch_size=100)) for seed in batch["seeds"]}
    assert "seeds" not in next(iter(data(0.5).val_dataloader())), "with images, validation is on images only"
    assert len(next(iter(data(1, generated_limit=3).val_dataloader()))["seeds"]) == 3


def test_no_share_changes_nothing() -> None:
    plain = read(data(0))
    assert all("seeds" not in batch for batch in plain) and [len(batch["path"]) for batch in plain] == [4, 4, 2]
    assert type(data(0).train_dataloader().sampler) is EpochSampler


@pytest.mark.parametrize("n", [1, 6, 7, 13])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_what_one_rank_sees(n: int, world: int) -> None:
    """A rank has 2 images and 1 generated sample in its batch; one rank has as many as all ranks together."""
    one = MixedSampler(n, 2 * world, world, seed=5)
    ranks = [MixedSampler(n, 2, 1, 5, rank, world) for rank in range(world)]
    for epoch in range(2):
        whole = one.order(epoch).reshape(-1, 3 * world)
        parts = [sampler.order(epoch).reshape(-1, 3) for sampler in ranks]
        assert all(len(part) == len(whole) == len(ranks[0]) / 3 for part in parts)
        for step, batch in enumerate(whole):
            together = [int(part[step][i]) for i in range(3) for part in parts]
            assert together == batch.tolist()
        assert set(range(n)) <= set(whole.ravel().tolist())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("share", [0.5, 1])
def test_resume_in_the_middle_of_an_epoch(share: float, workers: int) -> None:
    def keys(loader: Any, n: int) -> list[Any]:
        seen: list[Any] = []
        while len(seen) < n:
            for batch in loader:
                seen.append((batch["index"].tolist(), batch["seeds"]))
                if len(seen) == n:
                    break
        return seen

    limit = 10 if share == 1 else None
    whole = keys(data(share, generated_limit=limit).train_dataloader(), 9)
    loader = data(share, generated_limit=limit).train_dataloader()
    assert keys(loader, 4) == whole[:4]
    again = data(share, generated_limit=limit, num_workers=workers).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert keys(again, 5) == whole[4:]


def test_another_share_is_rejected_in_the_middle_of_an_epoch() -> None:
    loader = data(0.5).train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(UserError, match="generated samples was 2 in the interrupted run and is 1 now"):
        data(0.25).train_dataloader().load_state_dict(state)
    del state["generated_samples"]  # a checkpoint of an earlier version
    data(0.5).train_dataloader().load_state_dict(state)


# --- images


def test_images_belong_to_their_codes() -> None:
    made = generator()
    images, codes = Drawing(noise="const")(made, average(made), EIGHT)
    assert images.shape == (8, 3, 32, 32) and codes.shape == (8, 8, 16) and float(images.abs().max()) <= 1
    assert not images.requires_grad and not codes.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(made.synthesis(codes).clamp(-1, 1), images)


@pytest.mark.parametrize("noise", ["const", "random"])
def test_a_sample_depends_only_on_its_seed(noise: str) -> None:
    made, drawing = generator(), Drawing(noise=noise)
    state = torch.get_rng_state()
    images, codes = drawing(made, average(made), EIGHT)
    for i in (0, 5):
        image, code = drawing(made, average(made), EIGHT[i : i + 1])
        torch.testing.assert_close(image[0], images[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(code[0], codes[i])
    assert torch.equal(torch.get_rng_state(), state), "the global random state must not change"
    assert len({image.sum().item() for image in images}) == 8


def test_truncation_mixing_and_noise() -> None:
    made = generator()
    mean = average(made)
    images, codes = Drawing(mixing=0.0)(made, mean, EIGHT)
    assert torch.equal(codes, codes[:, :1].expand_as(codes)), "without mixing, all styles are equal"
    _, half = Drawing(truncation=0.5, mixing=0.0)(made, mean, EIGHT)
    torch.testing.assert_close(half - mean, 0.5 * (codes - mean))
    other, same = Drawing(mixing=0.0, noise="const")(made, mean, EIGHT)
    assert torch.equal(same, codes) and not torch.allclose(other, images)
    _, mixed = Drawing(mixing=1.0)(made, mean, EIGHT)
    assert torch.equal(mixed[:, 0], codes[:, 0]) and not torch.isclose(mixed[:, -1], codes[:, -1]).all(1).any()
    changes = (mixed.diff(dim=1).abs().amax(2) > 1e-6).sum(1)
    assert changes.tolist() == [1] * 8, "a sample mixes two codes"
    _, sometimes = Drawing(mixing=0.5)(made, mean, range(100))
    assert 30 < int((sometimes.diff(dim=1).abs().amax((1, 2)) > 1e-6).sum()) < 70


def test_mistakes_in_the_drawing() -> None:
    for wrong, message in (
        ({"truncation": 2}, "truncation=2 must be a number, from 0 to 1"),
        ({"mixing": -1}, "mixing=-1"),
        ({"noise": "constant"}, "Did you mean 'const'"),
    ):
        with pytest.raises(UserError, match=message):
            Drawing(**wrong)  # type: ignore[arg-type]

    class Plain(torch.nn.Module):
        n_styles, style_dim, z_dim = 8, 16, 16

    with pytest.raises(UserError, match="Plain has no noise_sides"):
        Drawing()(Plain(), torch.zeros(8, 16), EIGHT)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_images", [0, 3])
def test_a_batch_with_its_images(n_images: int) -> None:
    made = generator()
    batch = {"source": torch.full((n_images, 3, 16, 16), 2.0), "target": torch.full((n_images, 3, 8, 8), 2.0)}
    full = with_drawn({**batch, "seeds": EIGHT}, Drawing(), made, average(made))
    images, codes = Drawing()(made, average(made), EIGHT)
    assert full["source"].shape == (n_images + 8, 3, 16, 16) and bool((full["source"][:n_images] == 2).all())
    torch.testing.assert_close(full["source"][n_images:], torch.nn.functional.avg_pool2d(images, 2))
    torch.testing.assert_close(full["target"][n_images:], torch.nn.functional.avg_pool2d(images, 4))
    assert full["generated"].tolist() == [0.0] * n_images + [1.0] * 8
    assert torch.equal(full["codes"][n_images:], codes) and not full["codes"][:n_images].any()


# --- the loss


def test_latent_loss() -> None:
    torch.manual_seed(0)
    y, w, codes = torch.zeros(4, 3, 8, 8), torch.randn(4, 8, 16, requires_grad=True), torch.randn(4, 8, 16)
    generated = torch.tensor([0.0, 1.0, 0.0, 1.0])
    loss = LatentLoss()(LossInputs(y, y, w_plus=w, codes=codes, generated=generated))
    expected = (w - codes)[[1, 3]].square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    (gradient,) = torch.autograd.grad(loss, w)
    assert not gradient[[0, 2]].any() and gradient[[1, 3]].all()
    assert float(LatentLoss()(LossInputs(y, y, w_plus=w, codes=codes, generated=0 * generated)).detach()) == 0
    assert float(LatentLoss()(LossInputs(y, y, w_plus=codes, codes=codes))) == 0
    with pytest.raises(UserError, match="pass codes and w_plus"):
        LatentLoss()(LossInputs(y, y, w_plus=w))


def test_a_loss_is_left_out_without_its_inputs() -> None:
    y = torch.zeros(2, 3, 8, 8)
    losses = CompositeLoss({"l2": L2Loss(), "latent": LatentLoss()}, {"l2": 1.0, "latent": 1.0})
    assert set(losses(LossInputs(y, y))[1]) == {"l2"}
    assert set(losses(LossInputs(y, y, w_plus=y, codes=y))[1]) == {"l2", "latent"}
    with pytest.raises(UserError, match=r"None of the losses \(latent\) can be computed"):
        CompositeLoss({"latent": LatentLoss()}, {"latent": 1.0})(LossInputs(y, y))


# --- training


class Watch(pl.Callback):
    """Keeps the batches and outputs that callbacks get."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch, outputs))

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append((batch, outputs))


def fit(folder: Path, module: InversionDataModule, terms: dict[str, Any], steps: int = 2) -> tuple[Any, Watch]:
    torch.manual_seed(0)
    made, watch = generator(), Watch()
    encoder = GradualStyleEncoder(made.n_styles, 16, 3, 32, blocks=(1, 1, 1, 1), width=4)
    net = PSP(encoder, made, made.latent_average(64), source={"kind": "rgb", "size": 32})
    losses = CompositeLoss(terms, dict.fromkeys(terms, 1.0))
    lit = LitPSP(net, losses, lambda parameters: torch.optim.Adam(parameters, lr=2e-3), source_is_target=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[watch],
        num_sanity_val_steps=0, val_check_interval=steps, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(lit, module)
    return trainer, watch


@pytest.mark.parametrize("share", [0.5, 1])
def test_training(share: float, tmp_path: Path) -> None:
    trainer, watch = fit(tmp_path, data(share), {"l2": L2Loss(), "latent": LatentLoss()})
    for batch, outputs in watch.seen:
        assert batch["source"].shape == batch["target"].shape == outputs["y_hat"].shape
        assert torch.equal(batch["source"], batch["target"])
    assert watch.seen[0][0]["generated"].sum() == 4 * share and "seeds" not in watch.seen[0][0]
    logged = set(trainer.callback_metrics)
    assert {"train/loss_latent", "train/loss_l2", "val/loss_l2"} <= logged
    assert ("val/loss_latent" in logged) == (share == 1), "the codes of images are unknown"


def test_the_codes_are_learnt(tmp_path: Path) -> None:
    _, watch = fit(tmp_path, data(1, generated_limit=4), {"latent": LatentLoss()}, steps=60)
    losses = [float(outputs["loss"]) for _, outputs in watch.seen if "loss" in outputs]
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])


def test_codes_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss 'latent' compares codes.*data=generated"):
        fit(tmp_path, data(0), {"l2": L2Loss(), "latent": LatentLoss()})


def test_an_edited_sample_has_no_known_codes() -> None:
    """Edits of a refiner replace the first samples of such a batch, whose codes would be compared with theirs."""
    made = generator()
    torch.manual_seed(0)
    encoder = GradualStyleEncoder(made.n_styles, 16, 3, 32, blocks=(1, 1, 1, 1), width=4)
    losses = CompositeLoss({"latent": LatentLoss()}, {"latent": 1.0})
    lit = LitPSP(PSP(encoder, made, made.latent_average(64)), losses, torch.optim.Adam, source_is_target=True).eval()
    empty = {key: torch.zeros(0, 3, 32, 32) for key in ("source", "target")}
    batch = with_drawn({**empty, "seeds": EIGHT[:4]}, Drawing(), made, lit.net.latent_avg)
    total, _, _ = lit.evaluate(batch, "const", edits=3)
    last = {key: value[-1:] for key, value in batch.items()}
    alone, _, _ = lit.evaluate(last, "const")
    assert float(total.detach()) == pytest.approx(float(alone.detach()), rel=1e-4)

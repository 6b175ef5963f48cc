"""LitPSP, its callbacks and files, on a small network."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torchmetrics import MeanMetric

from psp_lightning.data.datamodules import InversionDataModule
from psp_lightning.data.spec import InputSpec, source_to_rgb
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.lit import rng
from psp_lightning.lit.callbacks import Forecast, ImageGrids, LastCheckpoint, forecast
from psp_lightning.lit.callbacks.image_grids import image_grid
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.lit.psp import LitPSP
from psp_lightning.losses import CompositeLoss, LossTerm
from psp_lightning.losses.identity import IDLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.optim import Ranger
from psp_lightning.utils.errors import UserError


def small_net() -> PSP:
    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=32, style_dim=32, n_mapping=2, max_channels=16)
    encoder = GradualStyleEncoder(generator.n_styles, 32, 3, 32, blocks=(1, 1, 1, 1), width=8)
    return PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": 32})


def module(terms: dict[str, LossTerm] | None = None, **options) -> LitPSP:
    terms = terms or {"l2": L2Loss()}
    losses = CompositeLoss(terms, dict.fromkeys(terms, 1.0))
    return LitPSP(small_net(), losses, lambda params: Ranger(params, lr=1e-3), log_every=1, **options)


def data(n: int = 6) -> InversionDataModule:
    train, val = (ToyFacesStore(size=32, seed=seed, n=n) for seed in (1, 2))
    return InversionDataModule(train, val, input_size=32, target_size=32, batch_size=2)


def trainer(folder: Path, steps: int = 1, callbacks=(), **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder, logger=options.pop("logger", False),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], num_sanity_val_steps=0,
        val_check_interval=options.pop("val_every", 1), check_val_every_n_epoch=None, **options,
    )  # fmt: skip


def test_after_a_step_frozen_networks_are_as_before(tmp_path: Path, is_frozen) -> None:
    """Claim: no parameter of a frozen network has a gradient, its buffers are unchanged, it is in eval mode."""
    torch.manual_seed(1)
    torch.save(ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict(), tmp_path / "id.pth")
    lit = module({"l2": L2Loss(), "id": IDLoss(weights=str(tmp_path / "id.pth"))})
    frozen = {"generator": lit.net.generator, "identity": lit.losses.terms["id"].network}
    before = {
        f"{name}.{key}": value.clone() for name, part in frozen.items() for key, value in part.state_dict().items()
    }
    encoder = {key: value.clone() for key, value in lit.net.encoder.state_dict().items()}
    fit = trainer(tmp_path)
    fit.fit(lit, data(n=2))
    lit.train()
    for name, part in frozen.items():
        assert not [key for key, p in part.named_parameters() if p.grad is not None], f"{name} has gradients"
        assert not [m for m in part.modules() if m.training], f"{name} is in train mode"
        for key, value in part.state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"]), f"{name}.{key} changed"
    assert is_frozen(lit.net.generator)
    assert any(not torch.equal(value, encoder[key]) for key, value in lit.net.encoder.state_dict().items())
    optimized = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in lit.net.encoder.parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_freed_after_their_step(tmp_path: Path, accumulate: int) -> None:
    """Otherwise they would use memory during the next forward pass. Accumulated gradients must be kept."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            seen.append(any(p.grad is not None for p in pl_module.parameters()))

    trainer(tmp_path, 2, [Watch()], accumulate_grad_batches=accumulate).fit(module(), data(8))
    assert seen == ([False] * 2 if accumulate == 1 else [False, True] * 2)


def test_batch_norm_policy() -> None:
    def modes(lit: LitPSP) -> set[bool]:
        return {m.training for m in lit.net.encoder.modules() if isinstance(m, nn.BatchNorm2d)}

    assert modes(module(batch_norm="frozen")) == {False}
    assert modes(module(batch_norm="frozen").eval().train()) == {False}
    assert modes(module(batch_norm="local")) == {True}
    with pytest.raises(UserError, match="Did you mean 'sync'"):
        module(batch_norm="sink")


def test_state_dict_contains_only_the_network_and_loads_strictly() -> None:
    lit = module()
    state = lit.state_dict()
    assert state and all(key.startswith("net.") for key in state)
    lit.load_state_dict(state)
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match="1 missing"):
        lit.load_state_dict(state)


def test_the_checkpoint_says_what_the_source_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The data module says it where the network does not; loaders alone cannot, which is reported."""
    lit = module()
    lit.net.source = {}
    trainer(tmp_path, callbacks=[LastCheckpoint(tmp_path, 1)]).fit(lit, data())
    assert lit.net.source == data().spec.to_dict() and not [w for w in recwarn if "source" in str(w.message)]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["psp"]["source"]["kind"] == "rgb"
    lit, loaders = module(), data()
    lit.net.source = {}
    with pytest.warns(UserWarning, match=r"psp-predict will reject them: give PSP\(\.\.\., source="):
        trainer(tmp_path, limit_val_batches=0).fit(lit, loaders.train_dataloader())


@pytest.mark.parametrize("size", [64, 48])
def test_targets_larger_than_the_generators_images_are_refused(size: int, tmp_path: Path) -> None:
    store = ToyFacesStore(size=size, n=2)
    larger = InversionDataModule(store, store, input_size=32, target_size=size, batch_size=2)
    with pytest.raises(UserError, match=f"targets have {size} px, but .* only 32 px: set domain.target_size=32"):
        trainer(tmp_path).fit(module(), larger)


class Exploding(LossTerm):
    """A loss term that is NaN for all images."""

    def forward(self, inputs):
        return inputs.y_hat.mean() * float("nan")


def test_nan_guard_names_term_step_and_files(tmp_path: Path) -> None:
    lit = module({"l2": L2Loss(), "boom": Exploding()})
    with pytest.raises(UserError, match=r"'boom' became nan at step 1.*toyfaces/seed1/"):
        trainer(tmp_path).fit(lit, data())


def test_validation_means_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    results = []
    for size in (1, 2, 5):
        fit, loader = trainer(tmp_path), data(n=5)
        loader.val_batch_size = size
        fit.validate(module(), loader, verbose=False)
        results.append(float(fit.callback_metrics["val/loss"]))
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_warmup_and_logged_steps(tmp_path: Path) -> None:
    lit = module(warmup_steps=4)
    trainer(tmp_path, steps=5, val_every=5, logger=CsvLog(tmp_path)).fit(lit, data())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "5"]


def test_resumed_log_keeps_the_rows_up_to_its_step(tmp_path: Path) -> None:
    log = CsvLog(tmp_path)
    for step in (1, 2, 3):
        log.log_metrics({"a": step}, step)
    log.save()
    again = CsvLog(tmp_path)
    again.keep_until(2)
    again.log_metrics({"a": 30, "b": 1}, 3)
    again.save()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1", ""), ("2", "2", ""), ("3", "30", "1")]


def test_checkpoint_is_plain_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = trainer(tmp_path, 2, [LastCheckpoint(tmp_path, None)], val_every=2)
    fit.fit(module(), data())
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 2 and content["psp"]["encoder"]["class"] == "GradualStyleEncoder"
    whole = path.read_bytes()

    def full(*args, **kwargs):
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        fit.save_checkpoint(path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_in_memory_is_returned_once_and_only_for_its_path(tmp_path: Path) -> None:
    torch.save({"from": "file"}, tmp_path / "other.ckpt")
    torch.save({"from": "file"}, tmp_path / "last.ckpt")
    plugin = AtomicCheckpointIO(tmp_path / "last.ckpt", {"from": "memory"})
    files = ("other.ckpt", "last.ckpt", "last.ckpt")
    assert [plugin.load_checkpoint(tmp_path / name)["from"] for name in files] == ["file", "memory", "file"]


def test_random_state_round_trip() -> None:
    import random

    state = rng.capture()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    rng.restore(state)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize(
    ("spec", "channels"), [(InputSpec("rgb", 8), 3), (InputSpec("sketch", 8), 1), (InputSpec("masked", 8), 4)]
)
def test_sources_are_shown_as_pictures(spec: InputSpec, channels: int) -> None:
    assert source_to_rgb(torch.ones(2, channels, 8, 8), spec).shape == (2, 3, 8, 8)


def test_labels_are_shown_in_their_colours() -> None:
    spec = InputSpec("labels", 2, n_classes=2, label_map={
        "classes": [{"id": 3, "name": "a", "color": [255, 0, 0]}, {"id": 9, "name": "b", "color": [0, 0, 255]}]
    })  # fmt: skip
    source = torch.zeros(1, 2, 2, 2)
    source[0, 1] = 1
    assert torch.equal(source_to_rgb(source, spec)[0, :, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_grid_has_a_row_for_each_sample_and_captions() -> None:
    images = torch.zeros(2, 3, 16, 16)
    assert image_grid(images, images, images, InputSpec("rgb", 16)).shape == (3, 32, 48)
    assert image_grid(images, images, images, InputSpec("rgb", 16), ["id 0.10", "id 0.20"]).shape == (3, 60, 48)


def test_a_grid_of_pictures_that_are_wide_enough_names_its_columns() -> None:
    images = torch.full((1, 3, 48, 48), -1.0)
    grid = image_grid(images, images, images, InputSpec("rgb", 48))
    assert grid.shape == (3, 14 + 48, 3 * 48)
    texts = grid[:, :14].split(48, dim=2)
    assert all((text > 0.9).any() for text in texts), "each column has its text"
    assert not torch.equal(texts[0], texts[1]) and not torch.equal(texts[1], texts[2])


def test_training_grid_shows_the_identity_similarity(tmp_path: Path) -> None:
    torch.save(ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict(), tmp_path / "id.pth")
    lit = module({"l2": L2Loss(), "id": IDLoss(weights=str(tmp_path / "id.pth"))})
    trainer(tmp_path, 1, [ImageGrids(tmp_path / "images", 1, 2)]).fit(lit, data(n=2))
    assert Image.open(tmp_path / "images" / "train_00000001.png").size == (96, 2 * (32 + 14))
    assert (tmp_path / "images" / "val_00000001.png").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_follows_float32(precision: str, tmp_path: Path) -> None:
    losses = []
    for kind in ("32-true", precision):
        fit = trainer(tmp_path, 3, precision=kind, val_every=3)
        fit.fit(module(noise="const"), data())
        losses.append(float(fit.callback_metrics["val/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# --- the forecast


@pytest.mark.parametrize(
    ("pace", "accumulate", "start", "total", "said", "warned"),
    [
        (0.4, 1, 0, 100_000, "step 17 of 100000: about 11 hours to go, at 0.4 s per step", True),
        (0.3, 1, 0, 500, "step 17 of 500: about 2 min to go, at 0.3 s per step", False),
        (0.1, 4, 100, 500, "step 117 of 500: about 3 min to go, at 0.4 s per step", False),
        (35.0, 1, 0, 20_000, "step 3 of 20000: about 8 days to go, at 35 s per step", True),
        (1.0, 1, 0, 17, None, False),
    ],
)
def test_the_length_of_a_run_is_forecast(
    pace: float, accumulate: int, start: int, total: int, said: str | None, warned: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    clock = 0.0
    monkeypatch.setattr(forecast, "monotonic", lambda: clock)
    callback = Forecast("Use a smaller network.")
    fake = SimpleNamespace(
        global_step=start, max_steps=total, is_global_zero=True,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        callback.on_train_start(fake)
        for batch in range(1, 25 * accumulate):
            clock += 100 if batch == 1 else pace  # the first step is slow
            fake.global_step = start + batch // accumulate
            callback.on_train_batch_end(fake)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[:1] == ([said] if said else [])
    assert len(messages) == bool(said) + warned and all("Use a smaller network." in text for text in messages[1:])


def test_a_metric_that_is_none_or_computes_several_numbers(tmp_path: Path) -> None:
    class Three(MeanMetric):
        def update(self, y_hat: torch.Tensor, y: torch.Tensor) -> None:
            super().update((y_hat - y).mean())

        def compute(self) -> torch.Tensor:
            return super().compute().repeat(3)

    with pytest.raises(UserError, match="The metric 'mine' must be an instance of torchmetrics.Metric, not <class"):
        module(metrics={"mine": Three})
    with pytest.raises(UserError, match=r"'mine': Three.compute returned a Tensor of shape \(3,\). Return one number"):
        trainer(tmp_path).fit(module(metrics={"mine": Three()}), datamodule=data())


def test_an_encoder_that_no_checkpoint_rebuilds_is_refused_before_the_first_step(tmp_path: Path) -> None:
    lit = module()
    del lit.net.encoder.config
    with pytest.raises(UserError, match="GradualStyleEncoder has no config"):
        trainer(tmp_path).fit(lit, datamodule=data())
    assert lit.trainer.global_step == 0

"""When a run validates, how it ends, and what it resumes from."""

from __future__ import annotations

import csv
import functools
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from psp_lightning.data.datamodules import InversionDataModule
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.lit.callbacks import EpochStart, LastCheckpoint, ValidateEvery
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.lit.psp import LitPSP
from psp_lightning.lit.run_folder import last_checkpoint
from psp_lightning.losses import CompositeLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.models.encoders import EncoderIntoW
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.optim import Ranger

SIZE = 32  # pixels


def module() -> LitPSP:
    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=SIZE, style_dim=8, n_mapping=1, channel_multiplier=1, max_channels=8)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.ones_(parameter)  # a resume that draws other noise computes other losses
    encoder = EncoderIntoW(8, input_size=SIZE, blocks=(1, 1, 1, 1), width=4)
    net = PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": SIZE})
    losses = CompositeLoss({"l2": L2Loss()}, {"l2": 1.0})
    return LitPSP(net, losses, lambda params: Ranger(params, lr=1e-3), log_every=1)


@functools.cache
def faces(seed: int, n: int) -> ToyFacesStore:
    return ToyFacesStore(SIZE, seed=seed, n=n, cache=True)


def fit(folder: Path, steps: int, n: int = 8, val_every: int = 100, callbacks: Any = (), **options: Any) -> pl.Trainer:
    """Train on n images in batches of two; resume if there is a checkpoint."""
    checkpoints, resume = folder / "checkpoints", last_checkpoint(folder)
    log = CsvLog(folder)
    if resume:
        log.keep_until(torch.load(resume, weights_only=True)["global_step"])
    best = ModelCheckpoint(checkpoints, "best", monitor="val/loss", enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=options.pop("max_epochs", -1), logger=log,
        plugins=[AtomicCheckpointIO()],
        callbacks=[EpochStart(), ValidateEvery(val_every), best, *callbacks, LastCheckpoint(checkpoints, None)],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1,
        check_val_every_n_epoch=None, **options,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    data = InversionDataModule(faces(1, n), faces(2, 2), input_size=SIZE, target_size=SIZE, batch_size=2)
    trainer.fit(module(), data, ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains without a break, once for the same arguments, and returns the folder."""

    @functools.cache
    def train(steps: int, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        fit(folder, steps, **options)
        return folder

    return train


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def validated(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder) if row.get("val/loss")]


class StopAt(pl.Callback):
    """Sets should_stop after a number of batches, or at the end of the first epoch."""

    def __init__(self, batches: int | None) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.batches is None:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("n", "accumulate", "val_every", "steps", "expected"),
    [
        (8, 3, 2, 8, [2, 4, 6, 8]),  # an epoch of 4 batches has steps after its third and its last batch
        (10, 2, 3, 7, [3, 6]),  # 5 batches: steps after the second, fourth and last one
        (7, 1, 5, 10, [5, 10]),
        (8, 2, 3, 6, [3, 6]),
    ],
)
def test_validates_every_n_steps(
    n: int, accumulate: int, val_every: int, steps: int, expected: list[int], tmp_path: Path
) -> None:
    fit(tmp_path, steps, n, val_every, accumulate_grad_batches=accumulate)
    assert validated(tmp_path) == expected


# an epoch has 4 batches and 2 steps
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_validates_every_n_steps_after_a_resume(cut: int, whole: Callable[..., Path], tmp_path: Path) -> None:
    options = {"val_every": 2, "accumulate_grad_batches": 3}
    fit(tmp_path, cut, **options)
    fit(tmp_path, 6, **options)
    assert validated(tmp_path) == validated(whole(6, **options)) == [2, 4, 6]
    assert_equal(final(whole(6, **options))["state_dict"], final(tmp_path)["state_dict"])


def test_a_run_that_was_killed_before_its_first_last_ckpt_goes_on_from_best_ckpt(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    fit(tmp_path, 3, val_every=3)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    fit(tmp_path, 5, val_every=3)
    assert rows(tmp_path) == rows(whole(5, val_every=3)) and len(rows(tmp_path)) == 6
    assert_equal(final(whole(5, val_every=3))["state_dict"], final(tmp_path)["state_dict"])


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not (different := [key for key in a if not torch.equal(a[key], b[key])]), different


# 4 batches an epoch; without accumulation: in the middle of an epoch, at its last batch, after it
@pytest.mark.parametrize(
    ("batches", "accumulate", "step"), [(2, 1, 2), (4, 1, 4), (None, 1, 4), (1, 3, 1), (3, 3, 1), (5, 3, 3)]
)
def test_a_stopped_run_goes_on_where_it_ended(
    batches: int | None, accumulate: int, step: int, whole: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    fit(tmp_path, 7, callbacks=[StopAt(batches)], **options)
    assert final(tmp_path)["global_step"] == step
    fit(tmp_path, 7, **options)
    assert_equal(final(whole(7, **options))["state_dict"], final(tmp_path)["state_dict"])
    assert [row["train/loss"] for row in rows(whole(7, **options)) if row["train/loss"]] == [
        row["train/loss"] for row in rows(tmp_path) if row["train/loss"]
    ]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"callbacks": [EarlyStopping("val/loss", patience=1, min_delta=1e9)], "val_every": 2}, 4),
        ({"callbacks": [EarlyStopping("val/loss", patience=1, min_delta=1e9)], "val_every": 1, "min_steps": 5}, 5),
        ({"max_time": timedelta(microseconds=1)}, 1),
        ({"max_epochs": 1}, 4),
    ],
    ids=["early stopping", "early stopping with min_steps", "max_time", "max_epochs"],
)
def test_last_ckpt_holds_the_end_of_every_run(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    trainer = fit(tmp_path, 50, **options)
    content = final(tmp_path)
    assert trainer.global_step == content["global_step"] == step
    if "max_epochs" not in options:  # Lightning validates a run that stops, and last.ckpt knows the result
        assert best_of(tmp_path)["best_model_score"] is not None


def best_of(folder: Path) -> dict[str, Any]:
    return next(state for key, state in final(folder)["callbacks"].items() if key.startswith("ModelCheckpoint"))


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_a_moved_run_keeps_its_best_score(how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    new.parent.mkdir()
    fit(old, 2, val_every=1)
    before = best_of(old)
    how(old, new)
    saved = (new / "checkpoints" / "best.ckpt").read_bytes()
    monkeypatch.setattr(L2Loss, "forward", lambda self, inputs: inputs.y_hat.mean() * 0 + 1e6)  # worse than all before
    fit(new, 4, val_every=1)
    after = best_of(new)
    assert after["best_model_score"] == before["best_model_score"]
    assert after["best_model_path"] == str(new / "checkpoints" / "best.ckpt") == next(iter(after["best_k_models"]))
    assert (new / "checkpoints" / "best.ckpt").read_bytes() == saved
    assert sorted(path.name for path in (new / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_last_ckpt_without_its_best_starts_with_a_new_best(tmp_path: Path) -> None:
    fit(tmp_path / "old", 1, val_every=1)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "old" / "checkpoints" / "last.ckpt", tmp_path / "new" / "checkpoints")
    fit(tmp_path / "new", 2, val_every=1)
    assert (tmp_path / "new" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(("ranks", "seconds", "stops"), [(1, 0.01, True), (2, 0.01, False), (2, 2.0, True)])
def test_second_ctrl_c_stops_at_once(
    ranks: int, seconds: float, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher of several ranks sends a signal again that the terminal has sent to them already."""
    callback, now = LastCheckpoint(tmp_path, None), [100.0]
    callback._ranks = ranks
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    callback._ask_to_stop(signal.SIGINT, None)
    now[0] += seconds
    if stops:
        with pytest.raises(KeyboardInterrupt):
            callback._ask_to_stop(signal.SIGINT, None)
    else:
        callback._ask_to_stop(signal.SIGINT, None)

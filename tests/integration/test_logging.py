"""Loggers and checkpoints chosen by settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def test_checkpoints_every_n_steps(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", *tiny, "callbacks.every.every_n_steps=1", "callbacks.best.monitor=val/psnr",
               "callbacks.best.mode=max", "run=r")  # fmt: skip
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "inversion" / "r" / "checkpoints"
    names = ["best.ckpt", "last.ckpt", "step_00000001.ckpt", "step_00000002.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert torch.load(folder / names[2], weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_the_log_of_a_run_of_any_name(locale: dict[str, str], shell, tiny: list[str], tmp_path: Path) -> None:
    name = "é".encode() if locale else b"caf\xe9"
    done = shell("train", *tiny, f"run={os.fsdecode(name)}", **locale)
    assert done.code == 0 and "Logging error" not in done.err, done.err
    log = os.path.join(os.fsencode(tmp_path), b"runs/inversion", name, b"train.log")
    assert b"/inversion/" + name in Path(os.fsdecode(log)).read_bytes()


def test_tensorboard(psp, tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = psp("train", *tiny, "logger=tensorboard", "run=r")
    assert done.code == 0, done.err
    assert list((tmp_path / "runs" / "inversion" / "r" / "tensorboard").glob("events.*"))


def test_wandb_offline_resumes_under_the_same_id(shell, tiny: list[str], tmp_path: Path) -> None:
    done = shell("train", *tiny, "logger=wandb", "logger.wandb.offline=true", "run=r")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "inversion" / "r"
    identity = (run / "wandb_id").read_text()
    done = shell("train", "resume=auto", "run=r", "trainer.max_steps=3")
    assert done.code == 0, done.err
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(identity) for name in folders)


@pytest.mark.parametrize("data", ["toyfaces", "folder"])
def test_overfitting_few_images_lowers_the_loss(data: str, psp, photos: Path, tmp_path: Path) -> None:
    settings = ["trainer=cpu", "debug=overfit10", "optimizer.lr=1e-3", "trainer.max_steps=24", "loss=[l2]"]
    settings += ["trainer.val_every=24", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"]
    settings += ["data.batch_size=4", "run=r", "callbacks.overfit.factor=1.05"]  # it falls more in 500 steps
    if data == "folder":
        (tmp_path / "photos").mkdir()
        for path in photos.glob("face_*.jpg"):
            (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
        settings += ["data=folder", "data.root=photos", "data.num_workers=0"]
    done = psp("train", *settings)
    assert done.code == 0, done.err
    rows = (tmp_path / "runs" / "inversion" / "r" / "csv" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses

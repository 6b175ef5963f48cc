"""psp-train and psp-doctor with samples that the generator draws."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from psp_lightning.models.stylegan2 import Generator

CODES = "loss=[l2,latent]"


def settings(tiny: list[str], *more: str) -> list[str]:
    """Return the tests' settings without those of drawn faces."""
    return [*(item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))), "task=inversion", *more]


def last(tmp_path: Path, run: str) -> dict:
    return torch.load(tmp_path / "runs" / "inversion" / run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 0.5])
def test_training_and_resume(share: float, psp, tiny: list[str], tmp_path: Path) -> None:
    """4 steps equal 2 steps, resume, 2 steps; a step of the epoch is left when the first part ends."""
    some = ["data=generated", "data.limit=6"]
    if share < 1:
        some = ["data.train.n=3", "data.val.n=3", f"data.generated_share={share}"]
    some = settings(tiny, *some, CODES, "trainer.log_every_n_steps=1")
    for run, steps in (("whole", 4), ("parts", 2)):
        done = psp("train", *some, f"run={run}", f"trainer.max_steps={steps}")
        assert done.code == 0, done.err
    done = psp("train", "resume=runs/inversion/parts", "trainer.max_steps=4")
    assert done.code == 0, done.err
    whole, parts = last(tmp_path, "whole"), last(tmp_path, "parts")
    for key in whole["state_dict"]:
        assert torch.equal(whole["state_dict"][key], parts["state_dict"][key]), key
    rows = [
        list(csv.DictReader((tmp_path / "runs/inversion" / run / "csv/metrics.csv").open()))
        for run in ("whole", "parts")
    ]
    assert rows[0] == rows[1]
    assert all(float(row["train/loss_latent"]) > 0 for row in rows[0] if row["train/loss"])
    assert ("val/loss_latent" in rows[0][0]) == (share == 1)
    assert (tmp_path / "runs/inversion/whole/images/train_00000002.png").is_file()
    done = psp("train", "resume=runs/inversion/parts", "trainer.max_steps=5", "data.batch_size=4")
    assert done.code == 1 and "batch size was 2" in done.err, done.err


def test_a_generator_of_the_user(psp, tiny: list[str], tmp_path: Path) -> None:
    """A file in rosinality's layout, without an average latent."""
    made = Generator.seeded(0, output_size=32, style_dim=512, n_mapping=8, channel_multiplier=2, max_channels=16)
    torch.save({"g_ema": made.state_dict()}, tmp_path / "mine.pt")
    own = ["generator=file", "generator.path=mine.pt", "domain.input_size=32", "domain.target_size=32"]
    done = psp("train", *settings(tiny, "data=generated", "data.limit=3", CODES, "metric=[psnr]", *own, "run=mine"))
    assert done.code == 0, done.err
    assert last(tmp_path, "mine")["global_step"] == 2


def test_doctor_without_images(psp, tmp_path: Path) -> None:
    options = ["trainer=cpu", "data=generated", "data.batch_size=2", "doctor.progress_bar=false"]
    done = psp("doctor", "data", *options, "loss=[l2,id,latent]")
    assert done.code == 0, done.out + done.err
    assert "0 for training, 0 for validation" in done.out and "draws the training samples itself" in done.out
    record = json.loads((tmp_path / "doctor" / "findings.json").read_text())
    assert record["findings"] == [] and record["seconds_per_step"] > 0
    assert not (tmp_path / "doctor" / "pairs.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data=generated", "data.generated_share=0.5"], "data.generated_share=0.5 needs images"),
        (["data=generated", "task=sketch2face"], "data.generated_share=1.0 needs task=inversion"),
        (["data=generated", "data.truncation=2"], "data.truncation=2 must be a number, from 0 to 1"),
        (["data=generated", "data.noise=fixed"], "data.noise=fixed is unknown"),
        (["data=folder", "data.generated_share=0.5"], "needs data.root=DIR"),
        (["data.generated_share=1.5"], "data.generated_share=1.5 must be a number, from 0 to 1"),
        (
            ["+trainer.overfit_batches=1", "data.generated_share=0.5"],
            "trainer.overfit_batches cannot be used with images and generated samples",
        ),
        (["data.generated_share=0.25"], "is 0.5 samples of a batch of 2, not a whole number. Choose 0.5"),
        (["data.generated_share=0.5", "loss=[latent]"], "none of the losses (latent) can be computed on validation"),
        (
            ["data.generated_share=0.5", "callbacks.best.monitor=val/loss_latent"],
            "callbacks.best.monitor=val/loss_latent is not logged",
        ),
        (["data.train=null"], "data.generated_share=0.0 needs images"),
        ([], "the loss 'latent' compares codes, which only generated samples have"),
    ],
)
def test_mistakes(psp, tiny: list[str], changes: list[str], message: str) -> None:
    done = psp("train", *settings(tiny, CODES, *changes))
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err

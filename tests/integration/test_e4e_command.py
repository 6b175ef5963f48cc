"""psp-train with the training of e4e and ReStyle: resume, prediction, and mistakes in the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psp_lightning import PSP

E4E = ["experiment=toyfaces_e4e", "editability.start=1", "editability.every=1", "editability.pool=2"]
EXACT = ["model.decay_steps=0", "trainer.log_every_n_steps=1"]  # otherwise, rates and rows depend on the last step
RESTYLE = ["experiment=toyfaces_restyle", "encoder.iterations=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("e4e", E4E), ("restyle", RESTYLE)])
def test_training_resume_and_prediction(psp, tiny: list[str], tmp_path: Path, kind: str, settings: list[str]) -> None:
    for run, steps in (("whole", 4), ("parts", 2)):
        done = psp("train", *settings, *tiny, *EXACT, f"run={run}", f"trainer.max_steps={steps}")
        assert done.code == 0, done.err
    done = psp("train", "resume=runs/inversion/parts", "trainer.max_steps=4")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "inversion"
    whole, parts = (
        torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "parts")
    )
    assert all(torch.equal(whole["state_dict"][key], parts["state_dict"][key]) for key in whole["state_dict"])
    logs = [(folder / run / "csv" / "metrics.csv").read_text() for run in ("whole", "parts")]
    assert logs[0] == logs[1], "the resumed run logs other values"
    if kind == "e4e":
        assert PSP.from_checkpoint(folder / "whole").encoder.differences == 3
        assert "train/loss_adversarial" in logs[0] and "val/loss_adversarial" not in logs[0]
        assert all(torch.equal(whole["e4e"][pool], parts["e4e"][pool]) for pool in ("real_pool", "fake_pool"))
        done = psp("train", "resume=runs/inversion/parts", "trainer.max_steps=5", "editability.every=2")
        assert done.code == 1 and "resume= cannot change editability.every: 1 -> 2" in done.err
    psp("data", "toyfaces", "out=faces", "n=2", "size=64")
    done = psp(
        "predict", "ckpt=runs/inversion/whole", "input=faces/CelebA-HQ-img", "output=out", "num_workers=0",
        "progress_bar=false",
    )  # fmt: skip
    assert done.code == 0 and "2 written" in done.out, done.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["editability=e4e"], "GradualStyleEncoder does not. Choose encoder=e4e"),
        ([*E4E, "editability.start=-1"], "editability.start=-1 must be a whole number, at least 0"),
        ([*E4E, "editability.delta_wieght=1"], "editability.delta_wieght"),
        ([*E4E, "model.compile=true"], "editability=e4e and model.compile=true exclude each other"),
        (["model.loss_per_pass=true"], "model.loss_per_pass=True needs an encoder of several passes"),
        (["model.loss_per_pass=each"], "model.loss_per_pass=each must be true or false"),
        (["editability=e4f"], "Did you mean 'e4e'"),
    ],
)
def test_mistakes(psp, tiny: list[str], settings: list[str], words: str) -> None:
    done = psp("train", *tiny, *settings)
    assert done.code == 1 and words in done.err, done.err

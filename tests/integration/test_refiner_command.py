"""psp-train refiner=features, its resume, and psp-predict with its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psp_lightning import PSP

REFINED = ["task=inversion", "refiner=features", "refiner.width=16", "refiner.blocks=1", "refiner.edit_share=0.5"]


@pytest.mark.slow
def test_training_resume_and_prediction(psp, tiny: list[str], tmp_path: Path) -> None:
    assert psp("train", *tiny, "task=inversion", "run=plain").code == 0
    plain = "init_from=runs/inversion/plain"
    for run, steps in (("whole", 4), ("parts", 2)):
        done = psp("train", *tiny, *REFINED, plain, f"run={run}", f"trainer.max_steps={steps}")
        assert done.code == 0, done.err
    done = psp("train", "resume=runs/inversion/parts", "trainer.max_steps=4")
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "inversion"
    states = {
        run: torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "parts")
    }
    whole, parts = (states[run]["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    before = PSP.from_checkpoint(folder / "plain" / "checkpoints" / "last.ckpt").state_dict()
    changed = {key for key in whole if key[4:] not in before or not torch.equal(whole[key], before[key[4:]])}
    assert changed and all(key.startswith("net.refiner.") for key in changed), "encoder and generator are frozen"

    net = PSP.from_checkpoint(folder / "whole")
    assert net.refiner is not None and net.invert(torch.zeros(1, 3, 64, 64)).features is not None
    psp("data", "toyfaces", "out=faces", "n=2", "size=64")
    predict = ["input=faces/CelebA-HQ-img", "num_workers=0", "progress_bar=false"]
    done = psp("predict", "ckpt=runs/inversion/whole", "output=out", *predict)
    assert done.code == 0 and "2 written" in done.out, done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["refiner.resolution=5"],
            "refiner.resolution=5: the generator's feature maps have the sides [4, 8, 16, 32, 64]",
        ),
        (["refiner.edit_share=1"], "edit_share=1"),
        (["task=superres"], "Set edit_share=0"),
        (["task=sketch2face", "refiner.edit_share=0"], "the source has 1 channels"),
        (["refiner.blocks=0"], "blocks=0"),
    ],
)
def test_mistakes(psp, tiny: list[str], settings: list[str], message: str) -> None:
    done = psp("train", *tiny, *REFINED, *settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err

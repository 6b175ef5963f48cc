"""psp-train refiner=features, its resume, and psp-predict with its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning import PSP
from psp_lightning.checkpoints.weight_files import save_generator
from psp_lightning.utils.images import from_uint8, to_uint8

REFINED = ["task=inversion", "refiner=features", "refiner.width=16", "refiner.blocks=1", "refiner.edit_share=0.5"]


def read_rgb(path: Path) -> torch.Tensor:
    """Return (3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


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
    done = psp("train", *tiny, "task=inversion", "init_from=runs/inversion/whole", "run=without")
    assert done.code == 1 and "this network has a refiner. Add refiner=features." in done.err, done.err
    before = PSP.from_checkpoint(folder / "plain" / "checkpoints" / "last.ckpt").state_dict()
    changed = {key for key in whole if key[4:] not in before or not torch.equal(whole[key], before[key[4:]])}
    assert changed and all(key.startswith("net.refiner.") for key in changed), "encoder and generator are frozen"

    net = PSP.from_checkpoint(folder / "whole")
    assert net.refiner is not None and net.invert(torch.zeros(1, 3, 64, 64)).features is not None
    psp("data", "toyfaces", "out=faces", "n=2", "size=64")
    predict = ["input=faces/CelebA-HQ-img", "num_workers=0", "progress_bar=false"]
    done = psp("predict", "ckpt=runs/inversion/whole", "output=out", *predict)
    assert done.code == 0 and "2 written" in done.out, done.err
    torch.manual_seed(0)
    torch.nn.init.normal_(net.refiner.change.weight, std=0.1)  # after four steps, the change is too small to be seen
    content = {"psp": net.describe(), "state_dict": {f"net.{key}": value for key, value in net.state_dict().items()}}
    torch.save(content, tmp_path / "changed.ckpt")
    assert psp("predict", "ckpt=changed.ckpt", "output=changed", *predict).code == 0
    faces = [from_uint8(read_rgb(tmp_path / "faces" / "CelebA-HQ-img" / f"{i}.jpg")) for i in range(2)]
    with torch.inference_mode():
        expected = to_uint8(net(torch.stack(faces)))
    for i in range(2):
        difference = read_rgb(tmp_path / "changed" / f"{i}.png").int() - expected[i].int()
        assert int(difference.abs().max()) <= 1
    settings = ["as=float", "timing=0", "images=0", "progress_bar=false"]
    done = psp(
        "evaluate", "ckpt=changed.ckpt", "data=folder", "data.root=faces/CelebA-HQ-img", "metric=[mse]", *settings
    )
    assert done.code == 0, done.err
    with torch.inference_mode():
        mse = float((net(torch.stack(faces)).clamp(-1, 1) - torch.stack(faces)).square().mean())
    record = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert record["metrics"]["mse"]["mean"] == pytest.approx(mse, rel=1e-3)


def test_a_network_of_another_generator_is_refused(psp, tiny: list[str], tmp_path: Path) -> None:
    """init_from= would replace the generator that the settings name."""
    net = PSP.from_pretrained("toyfaces/inversion")
    torch.nn.init.normal_(net.generator.convs[0].conv.weight)
    save_generator(tmp_path / "mine.safetensors", net.generator, {}, latent_avg=(net.latent_avg, "test"))
    settings = [*tiny, *REFINED, "encoder=gradual_small", "generator=file", "init_from=toyfaces/inversion"]
    done = psp("train", *settings, "generator.path=mine.safetensors", "run=r")
    message = "init_from=toyfaces/inversion contains another generator than generator.path=mine.safetensors"
    assert done.code == 1 and message in done.err, done.err
    done = psp("train", *settings, "generator.path=toyfaces/inversion", "run=r")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["refiner.resolution=5"],
            "refiner.resolution=5: the generator's feature maps have the sides [4, 8, 16, 32, 64]",
        ),
        (["refiner.edit_share=1", "refiner.train_encoder=true"], "edit_share=1"),
        (["task=superres", "refiner.train_encoder=true"], "Set edit_share=0 without them"),
        ([], "refiner.train_encoder=false freezes the encoder, which is not trained yet"),
        (
            ["data.generated_share=0.5", "refiner.train_encoder=true"],
            "edit_share=0.5: edits would replace all images of a batch, which has 2 samples and 1 image.",
        ),
        (["task=sketch2face", "refiner.edit_share=0"], "the source has 1 channels"),
        (["refiner.blocks=0"], "blocks=0"),
    ],
)
def test_mistakes(psp, tiny: list[str], settings: list[str], message: str) -> None:
    done = psp("train", *tiny, *REFINED, *settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err

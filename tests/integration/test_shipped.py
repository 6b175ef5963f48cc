"""Commands that use the weights in the package by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.toyfaces.records import write_records
from psp_lightning import PSP
from psp_lightning.checkpoints.weight_files import save_generator, save_psp
from psp_lightning.loading import load_generator
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.zoo import locate

ORIGIN = {"made_by": "psp-train", "licence": "MIT"}
QUIET = ["num_workers=0", "progress_bar=false", "accelerator=cpu"]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a small package with weights."""
    monkeypatch.setattr(locate, "shipped_dir", lambda: tmp_path / "package")
    folder = tmp_path / "package" / "toyfaces"
    generator = Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
    save_generator(folder / "generator.safetensors", generator, ORIGIN, torch.float16)
    write_records(folder)
    generator, average = load_generator("toyfaces/generator")
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    net = PSP(encoder, generator, average, source={"kind": "rgb", "size": 32})
    save_psp(folder / "inversion.safetensors", net, ORIGIN, torch.float16, "toyfaces/generator")
    write_records(folder)
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "x.png")


def test_predict(shipped, psp, tmp_path: Path) -> None:
    name = "toyfaces/inversion"
    done = psp("predict", f"ckpt={name}", "input=x.png", "output=out", *QUIET)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "out" / "x.png").size == (32, 32)
    (line,) = [json.loads(text) for text in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert line["status"] == "ok" and line["checkpoint"] == name
    psp("predict", f"ckpt={name}", "input=x.png", "output=out", *QUIET)
    (line,) = [json.loads(text) for text in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert line["status"] == "skipped" and line["checkpoint"] == name


def test_predict_mixes_styles(shipped, psp, tmp_path: Path) -> None:
    mix = ["mix.latent_mask=[4,5,6,7]", "mix.n_outputs=3"]
    done = psp("predict", "ckpt=toyfaces/inversion", "input=x.png", "output=out", *mix, *QUIET)
    assert done.code == 0, done.err
    pictures = [Image.open(tmp_path / "out" / f"x_{i}.png").tobytes() for i in range(3)]
    assert len(set(pictures)) == 3


def test_unknown_name(shipped, psp) -> None:
    done = psp("predict", "ckpt=toyfaces/inversoin", "input=x.png", "output=out", *QUIET)
    assert done.code == 1 and "Did you mean 'toyfaces/inversion'?" in done.err and "Traceback" not in done.err, done.err

"""Every task trains, validates, writes a checkpoint and predicts from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TASKS = ["inversion", "sketch2face", "seg2face", "superres", "frontalization", "inpainting", "toonify"]


def sources(folder: Path, task: str, n: int = 2) -> Path:
    """Draw source images of a task."""
    from psp_lightning.data.toyfaces import ToyFaces

    faces = ToyFaces(size=64, seed=9, n=n)
    folder.mkdir()
    for i in range(n):
        drawing = faces.draw(i)
        array = {"sketch2face": drawing.sketch, "seg2face": drawing.labels}.get(task, drawing.image)
        Image.fromarray(np.asarray(array).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_task_trains_validates_and_predicts(task: str, psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", f"task={task}", "run=r", *tiny)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / task / "r"
    for name in ("last", "best"):
        saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["psp"]["source"]["size"] == 64
        assert all(key.startswith("net.") for key in saved["state_dict"])
    rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/loss"]] == ["2"]
    assert (run / "images" / "val_00000002.png").exists() and (run / "images" / "train_00000002.png").exists()

    folder = sources(tmp_path / "in", task)
    done = psp("predict", f"ckpt={run}", f"input={folder}", "output=out", "progress_bar=false", "num_workers=0")
    assert done.code == 0, done.err
    for i in range(2):
        assert Image.open(tmp_path / "out" / f"{i}.png").size == (64, 64)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "ok"]
    assert all(line["seconds"] > 0 for line in lines)


@pytest.fixture
def real(tmp_path: Path, photos: Path) -> dict[str, Path]:
    """Make folders with photographs, a sketch and a label map, each paired with a photograph."""
    folders = {name: tmp_path / name for name in ("photos", "one", "sketches", "maps")}
    for folder in folders.values():
        folder.mkdir()
    for i in range(3):
        (folders["photos"] / f"face_{i}.jpg").write_bytes((photos / f"face_{i}.jpg").read_bytes())
    (folders["one"] / "a.jpg").write_bytes((photos / "face_0.jpg").read_bytes())
    (folders["sketches"] / "a.jpg").write_bytes((photos / "input_sketch.jpg").read_bytes())
    (folders["maps"] / "a.png").write_bytes((photos / "input_mask.png").read_bytes())
    return folders


@pytest.mark.parametrize("task", TASKS)
def test_task_trains_on_real_images(task: str, psp, tiny: list[str], real: dict[str, Path], tmp_path: Path) -> None:
    conditions = {"sketch2face": "sketches", "seg2face": "maps"}
    if task in conditions:
        source, target = real[conditions[task]], real["one"]
        data = [f"data.source={source}", f"data.target={target}"]
    else:
        source = real["photos"]
        data = [f"data.root={source}"]
    settings = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    done = psp("train", f"task={task}", "data=folder", "data.num_workers=0", *data, *settings, "run=r")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / task / "r"
    done = psp("predict", f"ckpt={run}", f"input={source}", "output=out", "progress_bar=false", "num_workers=0")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list(source.iterdir()))

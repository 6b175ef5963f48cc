"""Files of a training run, written without a training."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROWS = "step,train/loss,train/loss_l2,train/lr,val/loss,val/psnr\n"


def write_run(
    folder: Path, task: str = "inversion", seed: int = 0, steps: int = 40, done: int = 40, lr: float = 1e-4
) -> Path:
    """Write a run of `steps` steps that has done `done` steps, with a validation every 20 steps and an image grid."""
    rng = np.random.default_rng(seed)
    rows = [ROWS]
    for step in range(10, done + 1, 10):
        rows.append(f"{step},{rng.random()},{rng.random()},{lr},,\n")
        if step % 20 == 0:
            rows.append(f"{step},,,,{1 / step + seed},{10 + step / 10 + seed}\n")
    for name in ("csv", "checkpoints", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "csv" / "metrics.csv").write_text("".join(rows))
    settings = {
        "seed": seed, "run": folder.name, "task": {"name": task}, "paths": {"output_dir": str(folder)},
        "optimizer": {"lr": lr}, "trainer": {"max_steps": steps},
        "callbacks": {"best": {"dirpath": f"{folder}/checkpoints", "monitor": "val/loss", "mode": "min"}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    messages = [(0, f"{task} on toyfaces, {steps} steps; run directory {folder}")]
    if done >= steps:
        messages.append((10, f"done: step {done}, val/loss 0.1; {folder}/checkpoints/last.ckpt"))
    write_messages(folder, messages)
    with zipfile.ZipFile(folder / "checkpoints" / "last.ckpt", "w") as file:
        file.writestr("data", "")
    picture = Image.fromarray(rng.integers(0, 255, (64, 192, 3), np.uint8))
    for name in ("val_00000020.png", f"val_{done:08d}.png", f"train_{done + 10:08d}.png"):
        picture.save(folder / "images" / name)
    return folder


def write_messages(folder: Path, messages: Sequence[tuple[int, str]], logger: str = "psp_train") -> None:
    """Append messages to train.log, each with its second of an hour."""
    with (folder / "train.log").open("a") as file:
        for second, text in messages:
            file.write(f"[2024-01-05 12:{second // 60:02d}:{second % 60:02d},250][{logger}][INFO] - {text}\n")

"""Measure what limits a training on many devices: `python -m benchmarks.scaling`.

Prints the bytes of gradients that a step exchanges, the time and size of a checkpoint, and how many images a second one
worker process reads from a folder, for the encoder and the optimizer of `domain=ffhq task=inversion`. docs/scaling.md
works with these numbers. Takes about two minutes and 6 GB of memory and disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from psp_lightning.data.datamodules import InversionDataModule
from psp_lightning.data.stores import FolderStore
from psp_lightning.lit.files import AtomicCheckpointIO
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.optim.ranger import Ranger

STYLES, SIZE = 18, 256  # of a generator of 1024 px, and the side of the encoder's sources in pixels


def gradients() -> tuple[int, int]:
    """Return how many parameters the encoder has, and how many bytes of gradients in float32."""
    with torch.device("meta"):
        encoder = GradualStyleEncoder(STYLES, 512, 3, SIZE)
    n = sum(p.numel() for p in encoder.parameters())
    return n, 4 * n


def checkpoint(folder: Path, rounds: int) -> tuple[int, float]:
    """Return the bytes of a checkpoint and the median of the seconds that writing it takes, until it is on disk."""
    encoder = GradualStyleEncoder(STYLES, 512, 3, SIZE)
    optimizer = Ranger(encoder.parameters(), lr=1e-4)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    generator = nn.Linear(30_000, 1_000)  # as many numbers as the generator's weights, which a checkpoint contains
    content = {"state_dict": {**encoder.state_dict(), **generator.state_dict()}, "optimizer": optimizer.state_dict()}
    path, seconds = folder / "last.ckpt", []
    for _ in range(rounds):
        begin = time.perf_counter()
        AtomicCheckpointIO().save_checkpoint(content, path)
        os.sync()
        seconds.append(time.perf_counter() - begin)
    return path.stat().st_size, statistics.median(seconds)


def reading(folder: Path, side: int, workers: int, n: int) -> float:
    """Return how many samples a second `workers` processes load from JPEG files of `side` pixels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)  # smooth, as photographs are
    images = folder / str(side)
    images.mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray(np.roll(noise, i, 0)).resize((side, side), Image.Resampling.BICUBIC).save(images / f"{i}.jpg")
    store = FolderStore(root=images)
    data = InversionDataModule(store, store, SIZE, SIZE, batch_size=8, num_workers=workers)
    batches = iter(data.train_dataloader())
    next(batches)  # starts the workers
    begin, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["path"])
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--images", type=int, default=400, help="files for the reading test")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints to write")
    given = parser.parse_args()
    n, size = gradients()
    print(f"gradients: {n / 1e6:.1f} million parameters, {size / 1e6:.0f} MB in float32", flush=True)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for side in (256, 1024):
            for workers in (1, 2):
                rate = reading(folder, side, workers, given.images)
                print(f"folder of {side} px, {workers} worker(s): {rate:.0f} images a second", flush=True)
        size, seconds = checkpoint(folder, given.rounds)
        print(f"checkpoint: {size / 1e9:.2f} GB in {seconds:.1f} s, until it is on disk")


if __name__ == "__main__":
    main()

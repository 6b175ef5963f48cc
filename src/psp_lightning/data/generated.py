"""Samples that the generator of a training draws: the data module provides seeds, and `LitPSP` draws the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from psp_lightning.data.datasets import TaskDataset
from psp_lightning.data.own_samples import OwnSamples
from psp_lightning.utils.arguments import ArgumentError, number

EPOCH = 10_000  # generated samples in a training epoch without images
VALIDATION = 64  # generated samples in a validation without images


def generated_per_batch(share: float, batch_size: int) -> int:
    """Return how many of `batch_size` samples are generated.

    Raises:
        ArgumentError: `share` is not from 0 to 1, or does not give a whole number of samples. The number is not
            rounded, because one device and two devices with half its batch size would then see different samples.
    """
    n = number("generated_share", share, 0, 1) * batch_size
    if abs(n - round(n)) < 1e-6:
        return round(n)
    near = sorted({int(n), int(n) + 1} - {0, batch_size})
    advice = " or ".join(f"{k / batch_size:.4g}" for k in near)
    advice = f"Choose {advice}, or another batch_size." if advice else "Choose a larger batch_size."
    raise ArgumentError(
        "generated_share", share, f"is {n:.4g} samples of a batch of {batch_size}, not a whole number. {advice}"
    )


class GeneratedSamples(Dataset[dict[str, Any]]):
    """Samples of `images`, if given, followed by generated samples, which are only seeds.

    An index below the number of images gives a sample of `images`; any other index gives a generated sample with
    `seed`, `path` (a name for messages) and `index`. Its seed depends only on (seed, epoch, index) and on `train`.

    Args:
        images: data set of the task's images; None: all samples are generated.
        n: number of samples if there are no images.
        input_size, target_size: height and width of source and target.
        seed: seed of the generated samples.
        fixed: True: the generated samples are the same in each epoch.
        train: False: the generated samples differ from those in training, and are the same in each epoch.
    """

    def __init__(
        self,
        images: TaskDataset | OwnSamples | None,
        n: int,
        input_size: int,
        target_size: int,
        seed: int = 0,
        fixed: bool = False,
        train: bool = True,
    ) -> None:
        self.images, self.n, self.seed, self.train = images, n, seed, train
        self.n_images = 0 if images is None else len(images)
        self.input_size, self.target_size = input_size, target_size
        self.fixed = fixed or not train

    def __len__(self) -> int:
        return self.n_images or self.n

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.images is not None and index < self.n_images:
            return self.images[(epoch, index)]
        epoch = 0 if self.fixed else epoch
        # without the leading number, a validation would use the samples of the first training epoch
        drawn = np.random.SeedSequence([int(self.train), self.seed, epoch, index]).generate_state(1, np.uint64)[0]
        path = f"generated sample {index} of epoch {epoch}"
        return {"seed": int(drawn >> np.uint64(1)), "path": path, "index": torch.tensor(index)}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch whose last samples are the generated ones, without their images.

        `source` and `target` contain the r other samples, of which there may be none: (r, 3, input_size, input_size)
        and (r, 3, target_size, target_size). `seeds` is a list of g integers and not a tensor, because reading a tensor
        from a GPU would have to wait for the GPU. `path` and `index` have r + g entries.
        """
        images = [item for item in items if "seed" not in item]
        drawn = [item for item in items if "seed" in item]
        if images:
            batch = default_collate(images)
        else:
            sizes = {"source": self.input_size, "target": self.target_size}
            batch = {key: torch.zeros(0, 3, size, size) for key, size in sizes.items()}
        batch["path"] = [item["path"] for item in images + drawn]
        batch["index"] = torch.stack([item["index"] for item in images + drawn])
        batch["seeds"] = [item["seed"] for item in drawn]
        return batch

"""TaskDataset: a store's raw samples as tensors, with augmentation that depends only on (seed, epoch, index)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from psp_lightning.data.spec import InputSpec
from psp_lightning.data.stores import Store
from psp_lightning.data.transforms import rgb
from psp_lightning.utils.pictures import open_image


class TaskDataset(Dataset[dict[str, Any]]):
    """Items are dicts: `source` (spec.channels, size, size), `target` (3, target_size, target_size), `path` and
    `index`; `factor` is added if down-sampling factors are drawn (superres).

    The key is `(epoch, index)`, or just an index for epoch 0.

    Args:
        store: a prepared store.
        spec: description of the source tensor.
        target_size: height and width of the target.
        seed: seed of the flips, factors and holes.
        flip: probability of mirroring.
        independent_flip: mirror source and target independently (frontalization on folders, as in the reference)
            instead of together.
        train: False disables flips and treats every epoch as epoch 0, so validation always sees the same samples.
        masks: mask files for inpainting by `RawSample.path`. None: draw holes.
    """

    def __init__(
        self,
        store: Store,
        spec: InputSpec,
        target_size: int,
        seed: int = 0,
        flip: float = 0.0,
        independent_flip: bool = False,
        train: bool = True,
        masks: dict[str, Path] | None = None,
    ) -> None:
        self.store, self.spec, self.target_size, self.seed = store, spec, target_size, seed
        self.flip, self.independent_flip, self.train = flip, independent_flip, train
        self.masks = masks

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch if self.train else 0, index])
        # always drawn, because enabling flips must not change factors and holes
        first, second = (rng.random(2) < (self.flip if self.train else 0.0)).tolist()
        raw, load = self.store.load(index), self.spec.source.load
        factor = None
        if raw.source is None:
            image = open_image(raw.target)  # decode once for source and target
            image.filename = raw.path  # type: ignore[attr-defined]  # for messages
            mask = self.masks[raw.path] if self.masks is not None else None
            if self.spec.kind == "lowres" and self.spec.factors:
                factor = int(rng.choice(self.spec.factors))
            source = load(image, rng, factor, mask)
            same = self.spec.kind == "rgb" and self.spec.size == self.target_size
            target = source if same else rgb(image, self.target_size)
        else:
            # separate lowres sources already have low resolution
            source = load(raw.source, None if self.spec.kind == "lowres" else rng)
            target = rgb(raw.target, self.target_size)
        if first:
            source = self.spec.source.mirror(source)
        if second if self.independent_flip else first:
            target = target.flip(-1)
        item = {"source": source, "target": target, "path": raw.path, "index": torch.tensor(index)}
        return item if factor is None else {**item, "factor": factor}

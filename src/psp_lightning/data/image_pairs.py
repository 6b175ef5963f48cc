"""Pairs of finished images: the outputs of any tool, and their targets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from psp_lightning.data.pairing import pair
from psp_lightning.data.transforms import rgb
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.names import portable
from psp_lightning.utils.pictures import open_8bit


class ImagePairs(Dataset[dict[str, Any]]):
    """Items are dicts: `output` and `target`, float32 (3, H, W) in [-1, 1], and `index`. Pairs may differ in size.

    Args:
        outputs, targets: folders, whose images are paired by name (see `psp_lightning.data.pairing.pair`).
        size: resize both images to `size` x `size`, bilinearly as for training. None: keep the size, which must be
            equal in both images of a pair.

    Raises:
        UserError: a folder is missing or empty, or an image has no counterpart.
    """

    def __init__(
        self, outputs: str | os.PathLike[str], targets: str | os.PathLike[str], size: int | None = None
    ) -> None:
        for name, folder in (("outputs", outputs), ("targets", targets)):
            if not Path(folder).is_dir():
                raise UserError(f"{name}={folder} is not a folder. Set {name}= to a folder of images.")
        self.pairs = pair(outputs, targets, what="output", hint="")  # every image counts: none can be skipped
        self.root, self.size = Path(targets), size

    def __len__(self) -> int:
        return len(self.pairs)

    def names(self) -> list[str]:
        """Return the path of each target below its folder."""
        return [portable(target.relative_to(self.root)) for _, target in self.pairs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        images = [open_8bit(path, "RGB") for path in self.pairs[index]]
        if self.size is None and images[0].size != images[1].size:
            paths, sizes = self.pairs[index], [f"{image.width} x {image.height}" for image in images]
            raise UserError(
                f"{paths[0]} has {sizes[0]} pixels, but its target {paths[1]} has {sizes[1]}. size=N resizes both to "
                "N x N."
            )
        output, target = (rgb(image, self.size or image.size) for image in images)
        return {"output": output, "target": target, "index": index}

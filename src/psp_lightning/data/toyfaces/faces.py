"""ToyFaces: an endless dataset of drawn people with exact label maps and sketches, generated from a seed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from psp_lightning.data.toyfaces.drawing import paint
from psp_lightning.data.toyfaces.person import draw_person, draw_scene
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8, save_atomic

LARGEST = 8192  # pixels; a larger drawing fills the memory of most machines


class Drawing(NamedTuple):
    """A drawn face."""

    image: np.ndarray  # uint8 (H, W, 3)
    labels: np.ndarray  # uint8 (H, W), ids of CelebAMask-HQ
    sketch: np.ndarray  # uint8 (H, W), paper is 255


class ToyFaces(Dataset[dict[str, Any]]):
    """Drawn faces. Sample i is the same on every machine, whatever the order of access.

    Items are dicts: `image` float32 (3, size, size) in [-1, 1], `labels` int64 (size, size) with CelebAMask-HQ's 19
    ids, `sketch` float32 (1, size, size) in [0, 1] with paper at 1, `identity` int.

    Args:
        size: height and width in pixels, 16 to 8192.
        seed: determines the people and pictures.
        n: number of samples.
        identities: number of people; sample i shows person `i % identities`. None: each sample shows a different
            person.
    """

    def __init__(self, size: int = 64, seed: int = 0, n: int = 10_000, identities: int | None = None) -> None:
        if not 16 <= size <= LARGEST:
            raise UserError(f"toyfaces: faces have 16 to {LARGEST} px, not {size}.")
        if n < 1 or (identities is not None and identities < 1) or seed < 0:
            raise UserError("toyfaces: n and identities must be at least 1, and seed at least 0.")
        self.size, self.seed, self.n, self.identities = size, seed, n, identities

    def __len__(self) -> int:
        return self.n

    def identity(self, index: int) -> int:
        """Return the number of the person in sample `index`."""
        return index if self.identities is None else index % self.identities

    def path(self, index: int) -> str:
        """Return the name of sample `index` for messages."""
        return f"toyfaces/seed{self.seed}/{index:06d}"

    def draw(self, index: int, frontal: bool = False, toon: bool = False) -> Drawing:
        """Return sample `index` as uint8 arrays.

        Args:
            frontal: draw the same person and expression from the front in even light.
            toon: draw a cartoon with large eyes, flat colours and black outlines.

        Raises:
            IndexError: if `index` is outside 0..n-1.
        """
        if not 0 <= index < self.n:
            raise IndexError(f"toyfaces has the samples 0..{self.n - 1}, not {index}")
        person = draw_person(np.random.default_rng([self.seed, 1, self.identity(index)]))
        scene = draw_scene(np.random.default_rng([self.seed, 2, index]))
        return Drawing(*paint(person, scene.neutral() if frontal else scene, self.size, toon))

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawing = self.draw(index)
        return {
            "image": _image_tensor(drawing),
            "labels": torch.from_numpy(drawing.labels).long(),
            "sketch": torch.from_numpy(drawing.sketch).float().div(255)[None],
            "identity": self.identity(index),
        }

    def frontal(self, index: int) -> Tensor:
        """Return sample `index` from the front, float32 (3, size, size) in [-1, 1]."""
        return _image_tensor(self.draw(index, frontal=True))

    def toon(self, index: int) -> Tensor:
        """Return sample `index` as a cartoon, float32 (3, size, size) in [-1, 1]."""
        return _image_tensor(self.draw(index, toon=True))


def _image_tensor(drawing: Drawing) -> Tensor:
    return from_uint8(torch.from_numpy(drawing.image).permute(2, 0, 1).contiguous())


FOLDERS = ("CelebA-HQ-img", "CelebAMask-HQ-mask", "sketch")


def write_dataset(
    out: str | os.PathLike[str],
    n: int = 1000,
    size: int = 256,
    seed: int = 0,
    identities: int | None = None,
    suffix: str = ".jpg",
    progress: bool = True,
) -> Path:
    """Write toy faces to a folder with the layout of CelebAMask-HQ, and return the folder.

    The files are `CelebA-HQ-img/0.jpg`, `CelebAMask-HQ-mask/0.png` (class ids), `sketch/0.png` and so on. They are
    written under temporary names and then moved, so an interrupted call leaves only complete files.

    Raises:
        UserError: if the suffix is unknown, or the folder already contains a dataset or is not writable.
    """
    out = Path(out)
    if suffix not in (".jpg", ".png", ".webp"):
        raise UserError(f"Unknown image suffix {suffix!r}. Known: .jpg, .png, .webp.")
    faces = ToyFaces(size, seed, n, identities)
    if taken := [folder for folder in FOLDERS if (out / folder).is_dir() and any((out / folder).iterdir())]:
        raise UserError(f"{out / taken[0]} already contains files. Choose an empty folder, or remove them first.")
    for folder in FOLDERS:  # report a folder that cannot be made before the first face
        try:
            (out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {out / folder}: {error.strerror or error}.") from None
    steps: Any = range(n)
    if progress:
        from rich.progress import track

        steps = track(steps, description=f"{n} toy faces")
    options = {} if suffix == ".png" else {"quality": 95}
    for index in steps:
        names = [out / FOLDERS[0] / f"{index}{suffix}", *(out / folder / f"{index}.png" for folder in FOLDERS[1:])]
        try:
            for name, array in zip(names, faces.draw(index), strict=True):
                save_atomic(Image.fromarray(array), name, **(options if name.suffix == suffix else {}))
        except OSError as error:
            raise UserError(f"Cannot write {name}: {error.strerror or error}.") from None
    return out

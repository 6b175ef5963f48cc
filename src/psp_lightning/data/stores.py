"""Stores: where raw samples come from. A store knows files or drawings, but no tensors, sizes or augmentation."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from psp_lightning.data.pairing import list_images, pair
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.data.transforms import ImageLike
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.compat import moved
from psp_lightning.utils.errors import UserError

# CelebAMask-HQ as people have it: photos, training label maps, and sketches beside them
CELEBA_FOLDERS = {
    "image": ("CelebA-HQ-img",),
    "labels": ("CelebAMask-HQ-mask", "CelebAMaskHQ-mask", "mask"),
    "sketch": ("sketch", "CelebA-HQ-sketch"),
}


@dataclass(frozen=True)
class PairLayout:
    """Which two pictures a task asks of a store for each sample.

    Args:
        task: its name, for messages.
        source: `derived` (made from the target), `image`, `sketch` or `labels`.
        target: `image`, `frontal` (same face, seen from the front) or `toon`.
    """

    task: str
    source: str = "derived"
    target: str = "image"

    @property
    def other_kind(self) -> bool:
        """Whether the source is a picture of another kind than an image."""
        return self.source in ("sketch", "labels")


@dataclass(frozen=True)
class RawSample:
    """One sample before its transforms; `source` is None where it is derived from the target."""

    source: ImageLike | None
    target: ImageLike
    path: str


class Store(ABC):
    """Base of all stores. `prepare` comes first, then length and samples."""

    @abstractmethod
    def prepare(self, layout: PairLayout) -> None:
        """List the files, and check that this store has what `layout` asks for.

        Raises:
            UserError: saying what is missing and which setting gives it.
        """

    @property
    @abstractmethod
    def paired(self) -> bool:
        """Whether source and target are two pictures; otherwise both come from one."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> RawSample: ...

    @abstractmethod
    def paths(self) -> list[str]:
        """Return the `RawSample.path` of every sample."""


class FolderStore(Store):
    """Images in folders.

    Args:
        root: one folder: of target images for tasks whose source is derived from them, or laid out as CelebAMask-HQ
            (`CelebA-HQ-img`, `CelebAMask-HQ-mask`, `sketch`), for any task.
        source: folder of the sources, paired with `target` by file stem.
        target: folder of the targets.
        part: `train`, `val` or `all`. Without folders of its own, `val` is a share of the files, and `train` the rest;
            a single file is both.
        val_root, val_source, val_target: the same three folders for `val`.
        val_share: share of the files that `val` takes, at least one; chosen by file name, not by order.
        unpaired: `error` or `skip` for files without a counterpart.
        limit: use the first so many samples only; None: all.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        source: str | os.PathLike[str] | None = None,
        target: str | os.PathLike[str] | None = None,
        part: str = "all",
        val_root: str | os.PathLike[str] | None = None,
        val_source: str | os.PathLike[str] | None = None,
        val_target: str | os.PathLike[str] | None = None,
        val_share: float = 0.1,
        unpaired: str = "error",
        limit: int | None = None,
    ) -> None:
        self.own_val = any(folder is not None for folder in (val_root, val_source, val_target))
        if part == "val" and self.own_val:
            root, source, target = val_root, val_source, val_target
        self.root, self.source, self.target = root, source, target
        self.part, self.val_share = part, number("val_share", val_share, 0, 1)
        self.unpaired, self.limit = unpaired, whole("limit", limit, 1, optional=True)
        self._files: list[tuple[Path | None, Path]] = []

    def _folder(self, what: str) -> Path | None:
        """Return the subfolder of `root` that holds `what` in the CelebAMask-HQ layout."""
        folders = (Path(self.root, name) for name in CELEBA_FOLDERS[what]) if self.root else ()
        return next((folder for folder in folders if folder.is_dir()), None)

    def prepare(self, layout: PairLayout) -> None:
        source, target = self.source, self.target
        if target is None and self.root is not None:
            target = self._folder("image") or self.root
        if source is None and layout.other_kind:
            source = self._folder(layout.source)
        if target is None:
            folders = "data.source=DIR and data.target=DIR" if layout.other_kind else "data.root=DIR"
            raise UserError(f"data=folder for {layout.task} needs folders: {folders}.")
        if source is None and layout.other_kind:
            names = " or ".join(CELEBA_FOLDERS[layout.source])
            raise UserError(
                f"data=folder for {layout.task} needs data.source=DIR (the {layout.source}) and data.target=DIR (the "
                f"images), paired by file name"
                + (f"; {self.root} has no subfolder {names}." if self.root is not None else ".")
            )
        if source is not None and layout.task == "inpainting":
            raise UserError(
                "inpainting makes its holes itself: give the whole images as data.root=DIR, no data.source."
            )
        if source is None:
            self._files = [(None, path) for path in list_images(target)]
        else:
            self._files = list(pair(source, target, self.unpaired))
        if self.part != "all" and not self.own_val and len(self._files) > 1:
            self._files = self._split(self._files)
        self._files = self._files[: self.limit]

    def _split(self, files: list[tuple[Path | None, Path]]) -> list[tuple[Path | None, Path]]:
        n = min(max(1, round(len(files) * self.val_share)), len(files) - 1)
        held_out = set(sorted(files, key=lambda entry: zlib.crc32(entry[1].stem.encode()))[:n])
        return [entry for entry in files if (entry in held_out) == (self.part == "val")]

    @property
    def paired(self) -> bool:
        return self._files[0][0] is not None

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> RawSample:
        source, target = self._files[index]
        return RawSample(source, target, str(target))

    def paths(self) -> list[str]:
        return [str(target) for _, target in self._files]


class ToyFacesStore(Store):
    """Faces drawn when they are asked for; has what every task needs.

    Args:
        size: height and width in pixels of the drawings.
        seed: another seed, other faces.
        n: number of samples.
        identities: number of different people; None: each sample is another one.
        limit: use the first so many samples only; None: all.
        cache: keep what was drawn in memory (64 px: 12 to 24 KB a sample, in each process that draws).
    """

    def __init__(
        self,
        size: int = 64,
        seed: int = 0,
        n: int = 10_000,
        identities: int | None = None,
        limit: int | None = None,
        cache: bool = False,
    ) -> None:
        limit = whole("limit", limit, 1, optional=True)
        self.faces = ToyFaces(size, seed, n if limit is None else min(n, limit), identities)
        self._cache: dict[int, RawSample] | None = {} if cache else None
        self.layout = PairLayout("inversion")

    def prepare(self, layout: PairLayout) -> None:
        self.layout = layout
        if self._cache is not None:
            self._cache = {}

    @property
    def paired(self) -> bool:
        return self.layout.other_kind or self.layout.target != "image"

    def __len__(self) -> int:
        return len(self.faces)

    def load(self, index: int) -> RawSample:
        if self._cache is None:
            return self._draw(index)
        if index not in self._cache:
            self._cache[index] = self._draw(index)
        return self._cache[index]

    def _draw(self, index: int) -> RawSample:
        layout, faces = self.layout, self.faces
        drawing = faces.draw(index)
        source = None
        if self.paired:
            source = Image.fromarray(getattr(drawing, layout.source if layout.other_kind else "image"))
        if layout.target != "image":
            drawing = faces.draw(index, frontal=layout.target == "frontal", toon=layout.target == "toon")
        return RawSample(source, Image.fromarray(drawing.image), faces.path(index))

    def paths(self) -> list[str]:
        return [self.faces.path(index) for index in range(len(self))]


def __getattr__(name: str) -> Any:
    return moved(__name__, name)

"""Stores: sources of raw samples. A store knows files or drawings, but not tensors, input sizes or augmentation."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from psp_lightning.data.pairing import Matching, list_images, match, refuse_unpaired
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.compat import moved
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.pictures import ImageLike

# Common layouts of CelebAMask-HQ: photos, training label maps, and sketches next to them.
CELEBA_FOLDERS = {
    "image": ("CelebA-HQ-img",),
    "labels": ("CelebAMask-HQ-mask", "CelebAMaskHQ-mask", "mask"),
    "sketch": ("sketch", "CelebA-HQ-sketch"),
}


@dataclass(frozen=True)
class PairLayout:
    """The two pictures per sample that a task requests from a store.

    Args:
        task: name of the task, for messages.
        source: `derived` (from the target), `image`, `sketch` or `labels`.
        target: `image`, `frontal` (the same face from the front) or `toon`.

    Raises:
        UserError: `source` or `target` is something else.
    """

    task: str
    source: str = "derived"
    target: str = "image"

    def __post_init__(self) -> None:
        choice("source", self.source, ("derived", "image", "sketch", "labels"))
        choice("target", self.target, ("image", "frontal", "toon"))

    @property
    def other_kind(self) -> bool:
        """Whether the source is a sketch or a label map."""
        return self.source in ("sketch", "labels")


@dataclass(frozen=True)
class RawSample:
    """One sample before its transforms. `source` is None if it is derived from the target."""

    source: ImageLike | None
    target: ImageLike
    path: str


class Store(ABC):
    """Base class of stores. Call `prepare` before anything else."""

    @abstractmethod
    def prepare(self, layout: PairLayout) -> None:
        """List the files, and check that this store has the pictures of `layout`.

        Raises:
            UserError: if something is missing. The message names the setting that provides it.
        """

    @property
    @abstractmethod
    def paired(self) -> bool:
        """Whether source and target are two pictures. Otherwise both come from the same one."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> RawSample: ...

    @abstractmethod
    def paths(self) -> list[str]:
        """Return the `RawSample.path` of every sample."""

    def listing(self) -> tuple[Path, list[str]]:
        """Return a folder and all pictures in it, with which masks are paired; `paths` may be only some of them."""
        paths = self.paths()
        return Path(os.path.commonpath([os.path.dirname(path) for path in paths])), paths


class FolderStore(Store):
    """Images in folders.

    Args:
        root: a folder of target images, for tasks that derive the source from the target, or a folder with the layout
            of CelebAMask-HQ (`CelebA-HQ-img`, `CelebAMask-HQ-mask`, `sketch`), for any task.
        source: folder of the sources, paired with `target` by file stem.
        target: folder of the targets.
        part: `train`, `val` or `all`. Without separate folders, `val` is a share of the files and `train` is the rest;
            a single file is in both parts.
        val_root, val_source, val_target: separate folders for `val`.
        val_share: share of the files in `val`, at least one file; chosen by file name, independent of the order.
        unpaired: `error` or `skip` for files without a counterpart.
        limit: use only the first `limit` samples. None: all.
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
        self._listing: tuple[Path, list[str]] = (Path(), [])
        self.matching: Matching | None = None  # how sources and targets pair up, once prepared

    def _folder(self, what: str) -> Path | None:
        """Return the subfolder of `root` with `what` in the CelebAMask-HQ layout, or None."""
        folders = (Path(self.root, name) for name in CELEBA_FOLDERS[what]) if self.root else ()
        return next((folder for folder in folders if folder.is_dir()), None)

    def folders(self, layout: PairLayout) -> tuple[Path | None, Path]:
        """Return the folder of the sources, or None if they are made from the targets, and the folder of the targets.

        Raises:
            UserError: a folder that `layout` needs is not set.
        """
        source, target = self.source, self.target
        if target is None and self.root is not None:
            target = self._folder("image") or self.root
        if source is None and layout.other_kind:
            source = self._folder(layout.source)
        if layout.other_kind and (source is None or target is None):
            names = " or ".join(CELEBA_FOLDERS[layout.source])
            raise UserError(
                f"data=folder for {layout.task} needs data.source=DIR (the {layout.source}) and data.target=DIR (the "
                "images), paired by file name."
                + (f" {self.root} has no subfolder {names}." if self.root is not None else "")
            )
        if target is None:
            raise UserError(f"data=folder for {layout.task} needs data.root=DIR.")
        if source is not None and layout.task == "inpainting":
            raise UserError(
                "inpainting makes the holes itself. Set data.root=DIR to the complete images, without data.source."
            )
        return None if source is None else Path(source), Path(target)

    def prepare(self, layout: PairLayout) -> None:
        source, target = self.folders(layout)
        if source is None:
            self.use(target, [(None, path) for path in list_images(target)])
        else:
            self.matching = match(source, target)
            refuse_unpaired(self.matching, source, target, self.unpaired)
            self.use(target, list(self.matching.pairs))

    def use(self, target: Path, files: list[tuple[Path | None, Path]]) -> None:
        """Take this part's share of all `files`, the pairs of source and target in the folder `target`."""
        self._files = files
        self._listing = (target, [str(path) for _, path in files])
        if self.part != "all" and not self.own_val and len(self._files) > 1:
            self._files = self._split(self._files)
        self._files = self._files[: self.limit]

    def _split(self, files: list[tuple[Path | None, Path]]) -> list[tuple[Path | None, Path]]:
        n = min(max(1, round(len(files) * self.val_share)), len(files) - 1)
        held_out = set(sorted(files, key=lambda entry: zlib.crc32(os.fsencode(entry[1].stem)))[:n])
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

    def listing(self) -> tuple[Path, list[str]]:
        return self._listing


class ToyFacesStore(Store):
    """Faces drawn on demand, with the pictures for every task.

    Args:
        size: height and width of the drawings in pixels.
        seed: determines the faces.
        n: number of samples.
        identities: number of people. None: every sample shows a different person.
        limit: use only the first `limit` samples. None: all.
        cache: keep the drawings in memory (at 64 px 12 to 24 KB per sample, in each process that draws).
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
        self.cache = cache
        self.prepare(PairLayout("inversion"))

    def prepare(self, layout: PairLayout) -> None:
        self.layout = layout
        self._cached: dict[int, RawSample] = {}

    @property
    def paired(self) -> bool:
        return self.layout.other_kind or self.layout.target != "image"

    def __len__(self) -> int:
        return len(self.faces)

    def load(self, index: int) -> RawSample:
        if index in self._cached:
            return self._cached[index]
        layout, faces = self.layout, self.faces
        drawing = faces.draw(index)
        source = None
        if self.paired:
            source = Image.fromarray(getattr(drawing, layout.source if layout.other_kind else "image"))
        if layout.target != "image":
            drawing = faces.draw(index, frontal=layout.target == "frontal", toon=layout.target == "toon")
        sample = RawSample(source, Image.fromarray(drawing.image), faces.path(index))
        if self.cache:
            self._cached[index] = sample
        return sample

    def paths(self) -> list[str]:
        return [self.faces.path(index) for index in range(len(self))]


def __getattr__(name: str) -> Any:
    return moved(__name__, name)

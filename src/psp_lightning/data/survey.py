"""Read every picture of a training once, and keep a few small facts about each for the checks of psp-doctor."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from psp_lightning.data.labels import IGNORED, NO_CLASS, LabelMap, load_label_map
from psp_lightning.data.masks import TONES, as_mask
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.stores import Store
from psp_lightning.data.transforms import check_lossless, read_labels
from psp_lightning.utils.errors import UserError, clean
from psp_lightning.utils.pictures import ImageLike, opacity, open_image, to_8bit
from psp_lightning.utils.progress import track

THUMB = 16  # height and width of the thumbnails in pixels
DRAWN = 256  # number of pictures that are checked if a store has no files
TONE_LIMITS = ((0, 64), (64, 192), (192, 256))  # levels of dark, middle and light pixels of a sketch
# Share of pixels that differ from all their neighbours, above which a label map was compressed with loss or resized
# with interpolation. In maps of drawn faces it is 0.002 at most, and 0.008 or more after JPEG or bilinear resizing.
SPECKLES = 0.005


class Picture(NamedTuple):
    """A picture that a training uses.

    Attributes:
        name: its path, or its name for messages.
        role: `source`, `target`, `image` (both, if the source is made from the target) or `mask`.
        kind: how the file is read: `image`, `sketch`, `labels` or `mask`.
        part: `train` or `val`.
        load: returns the file, or the picture if it is drawn.
    """

    name: str
    role: str
    kind: str
    part: str
    load: Callable[[], ImageLike]


@dataclass(frozen=True)
class Facts:
    """What the checks need to know about a picture.

    Attributes:
        name, role, kind, part: as in `Picture`.
        broken: why the file cannot be decoded; empty if it can.
        unusable: why its pixels cannot be used; empty if they can.
        size: width and height in pixels, upright.
        depth: `colour`, `grey`, `transparent`, `16-bit grey`, `CMYK` or another mode of Pillow.
        digest: hash of size and pixels.
        thumb: uint8 (THUMB, THUMB, 3); None for label maps, masks and pictures that cannot be used.
        tones: share of dark, middle and light pixels of a sketch.
        coloured: whether a sketch has colours.
        lossy: why the ids of a label map are not exact; empty if they are.
        outside: ids of a label map that are not in the map, with the number of their pixels.
        pixels: int64 (n_classes,), the number of pixels of each class.
    """

    name: str
    role: str
    kind: str
    part: str
    broken: str = ""
    unusable: str = ""
    size: tuple[int, int] = (0, 0)
    depth: str = ""
    digest: bytes = b""
    thumb: np.ndarray | None = None
    tones: tuple[float, float, float] = (0.0, 0.0, 0.0)
    coloured: bool = False
    lossy: str = ""
    outside: dict[int, int] = field(default_factory=dict)
    pixels: np.ndarray | None = None


def is_drawn(store: Store) -> bool:
    """Return whether a prepared store draws its pictures instead of reading files."""
    return isinstance(store.load(0).target, Image.Image)


def pictures(
    store: Store,
    spec: InputSpec,
    part: str,
    masks: dict[str, Path] | None = None,
    samples: Iterable[int] | None = None,
) -> list[Picture]:
    """List the pictures of a prepared store, each file once.

    Args:
        store: the store; if it draws its pictures, only the first `DRAWN` samples are listed.
        spec: description of the source.
        part: `train` or `val`.
        masks: mask files of inpainting by `RawSample.path`.
        samples: indices of the samples; None: all.
    """
    if not len(store):
        return []
    kind = {"sketch": "sketch", "labels": "labels"}.get(spec.kind, "image")
    paths = store.paths()
    drawn = is_drawn(store)
    if samples is None:
        samples = range(min(len(store), DRAWN) if drawn else len(store))
    found: dict[tuple[str, str], Picture] = {}
    for index in samples:
        for role in ("source", "target") if store.paired else ("image",):
            load = functools.partial(_load, store, index, "target" if role == "image" else role)
            name = paths[index] if drawn else os.fspath(load())  # type: ignore[arg-type]
            found.setdefault((role, name), Picture(name, role, kind if role == "source" else "image", part, load))
        if masks is not None:
            mask = masks[paths[index]]
            found.setdefault(
                ("mask", str(mask)), Picture(str(mask), "mask", "mask", part, functools.partial(Path, mask))
            )
    return list(found.values())


def _load(store: Store, index: int, role: str) -> ImageLike:
    return getattr(store.load(index), role)


def survey(
    pictures: Sequence[Picture], label_map: LabelMap | None = None, workers: int = 1, progress: bool = False
) -> list[Facts]:
    """Read all pictures in threads; return about one kilobyte of facts for each, in the order of the pictures."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        read = pool.map(functools.partial(examine, label_map=label_map), pictures)
        return list(track(read, "reading pictures", len(pictures), progress))


def examine(picture: Picture, label_map: LabelMap | None = None) -> Facts:
    """Read one picture, and return its facts, including everything that is wrong with it."""
    facts: dict[str, Any] = {"name": picture.name, "role": picture.role, "kind": picture.kind, "part": picture.part}
    source = picture.load()
    try:
        image = open_image(source)
    except UserError as error:
        reason = error.__context__ if isinstance(error.__context__, Exception) else error
        unknown = isinstance(reason, UnidentifiedImageError)
        return Facts(**facts, broken="not an image" if unknown else clean(str(reason)))
    facts |= {"size": image.size, "depth": _depth(image)}
    try:
        if picture.kind == "labels":
            facts |= _labels(image, source, label_map or load_label_map())
        elif picture.kind == "mask":
            facts["digest"] = _digest(as_mask(image, THUMB))
        else:
            rgb = to_8bit(image, "RGB")
            facts["digest"] = _digest(np.asarray(rgb))
            facts["thumb"] = np.asarray(rgb.resize((THUMB, THUMB), Image.Resampling.BOX))
            if picture.kind == "sketch":
                facts |= _sketch(image, facts["thumb"])
    except UserError as error:
        facts["unusable"] = str(error)
    return Facts(**facts)


def _depth(image: Image.Image) -> str:
    if image.mode == "F":
        return "floating point"
    if opacity(image) is not None:
        return "transparent"
    if image.mode[0] == "I":
        return "16-bit grey"
    if image.mode in ("1", "L", "LA", "La"):
        return "grey"
    return "CMYK" if image.mode == "CMYK" else "colour"


def _digest(pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
    digest.update(repr(pixels.shape).encode())
    return digest.digest()


def _sketch(image: Image.Image, thumb: np.ndarray) -> dict[str, Any]:
    counts = np.array(to_8bit(image, "L").histogram(), float)
    dark, middle, light = (float(counts[low:high].sum() / counts.sum()) for low, high in TONE_LIMITS)
    return {"tones": (dark, middle, light), "coloured": bool(np.ptp(thumb.astype(int), axis=-1).max() > TONES)}


def _labels(image: Image.Image, source: ImageLike, label_map: LabelMap) -> dict[str, Any]:
    try:
        check_lossless(image, source)
    except UserError:
        return {"lossy": f"{image.format} files are compressed with loss"}
    ids = read_labels(source, label_map)
    known = np.where((ids >= 0) & (ids < len(label_map.lookup())), ids, -1)
    channel = np.where(known >= 0, label_map.lookup()[known.clip(min=0)], NO_CLASS)
    outside, counts = np.unique(ids[channel == NO_CLASS], return_counts=True)
    speckles = _speckles(ids)
    return {
        "digest": _digest(ids),
        "outside": dict(zip(outside.tolist(), counts.tolist(), strict=True)),
        "pixels": np.bincount(channel[channel < IGNORED], minlength=len(label_map)),
        "lossy": f"{speckles:.1%} of its pixels differ from all their neighbours" if speckles > SPECKLES else "",
    }


def _speckles(ids: np.ndarray) -> float:
    """Return the share of inner pixels whose id differs from the ids of all eight neighbours."""
    if min(ids.shape) < 3:
        return 0.0
    inner = ids[1:-1, 1:-1]
    lonely = np.ones(inner.shape, bool)
    for y, x in itertools.product(range(3), range(3)):
        if (y, x) != (1, 1):
            lonely &= ids[y : y + inner.shape[0], x : x + inner.shape[1]] != inner
    return float(lonely.mean())

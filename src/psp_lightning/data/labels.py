"""Label maps: the ids, names and colours of segmentation classes, read from a YAML file; colouring of label images."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from psp_lightning.utils.errors import UserError

CELEBAMASK_HQ = Path(__file__).with_name("celebamask_hq.yaml")
NO_CLASS = 65535  # entry of the look-up table for an id outside the map
IGNORED = 65534


@dataclass(frozen=True)
class LabelMap:
    """The classes of a segmentation. Channel i of a one-hot tensor is class `ids[i]`.

    Args:
        ids: pixel value of each class in label images.
        names: name of each class.
        colors: colour of each class in pictures, RGB in 0..255.
        mirror: pairs of ids that swap when the image is mirrored (left and right eye).
        ignore: ids without a class, allowed in the files and all zero in the one-hot tensor.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    mirror: tuple[tuple[int, int], ...] = ()
    ignore: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the layout of the YAML file."""
        rows = zip(self.ids, self.names, self.colors, strict=True)
        return {
            "classes": [{"id": i, "name": name, "color": list(color)} for i, name, color in rows],
            "mirror": [list(pair) for pair in self.mirror],
            "ignore": list(self.ignore),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "label map") -> LabelMap:
        """Build a map from the layout of the YAML file.

        Raises:
            UserError: if a part is missing, malformed or repeated. The message names `origin` and the entry.
        """
        try:
            rows = values["classes"]
            ids = tuple(_whole(row["id"]) for row in rows)
            if not ids:
                raise ValueError("it has no classes")
            names = tuple(str(row["name"]) for row in rows)
            given = [tuple(_whole(c) for c in row["color"]) if "color" in row else None for row in rows]
            mirror = tuple((_whole(a), _whole(b)) for a, b in values.get("mirror") or ())
            ignore = tuple(_whole(i) for i in values.get("ignore") or ())
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{origin}: not a label map ({type(error).__name__}: {error}). It needs a list 'classes' with entries "
                "such as {id: 0, name: background, color: [0, 0, 0]}, see " + str(CELEBAMASK_HQ)
            ) from None
        for what, items in (("id", ids), ("name", names)):
            if repeated := [item for item, n in Counter(items).items() if n > 1]:
                raise UserError(f"{origin}: the {what} {repeated[0]!r} is given twice.")
        if wrong := [i for i in (*ids, *ignore) if not 0 <= i < IGNORED]:
            raise UserError(f"{origin}: id {wrong[0]} is outside 0..{IGNORED - 1}.")
        if wrong := [i for pair in mirror for i in pair if i not in ids]:
            raise UserError(f"{origin}: 'mirror' names id {wrong[0]}, which is not a class.")
        palette = default_colors(max(ids) + 1).tolist()  # after the checks above, because a wrong id may be huge
        colors = tuple(tuple(palette[i]) if color is None else color for i, color in zip(ids, given, strict=True))
        if any(len(color) != 3 or not all(0 <= c <= 255 for c in color) for color in colors):
            raise UserError(f"{origin}: a color must be three numbers from 0 to 255.")
        return cls(ids, names, colors, mirror, ignore)  # type: ignore[arg-type]

    @classmethod
    def numbered(cls, n_classes: int) -> LabelMap:
        """Return a map of the ids 0..n_classes-1 without names, or CelebAMask-HQ's map for 19 classes."""
        if n_classes == 19:
            return load_label_map()
        if not 1 <= n_classes <= IGNORED:
            raise UserError(f"n_classes={n_classes} must be from 1 to {IGNORED}.")
        return cls.from_dict({"classes": [{"id": i, "name": f"class {i}"} for i in range(n_classes)]})

    def mirrored_channels(self) -> list[int]:
        """Return the channel that replaces each channel in a mirrored image."""
        partner = {a: b for pair in self.mirror for a, b in (pair, pair[::-1])}
        return [self.ids.index(partner.get(i, i)) for i in self.ids]

    def lookup(self) -> np.ndarray:
        """Return the channel of each pixel value, uint16 (65536,), with `NO_CLASS` and `IGNORED` for other values."""
        table = np.full(65536, NO_CLASS, np.uint16)
        table[list(self.ignore)] = IGNORED
        table[list(self.ids)] = np.arange(len(self.ids))
        return table


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and value != number:  # `int` drops the fraction
        raise ValueError(f"{value} is not a whole number")
    return number


def load_label_map(path: str | os.PathLike[str] = CELEBAMASK_HQ) -> LabelMap:
    """Load a label-map YAML file, by default CelebAMask-HQ's 19 classes.

    Raises:
        UserError: if the file is missing, not YAML or not a label map.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Label map {path}: {reason}. Give the path of a label-map YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Label map {path}: not a YAML file ({' '.join(str(error).split())}).") from None
    return LabelMap.from_dict(values, origin=f"Label map {path}")


def default_colors(n: int) -> np.ndarray:
    """Return n distinct colours, uint8 (n, 3); the first is black."""
    index = np.arange(n)
    hue = (index * 0.61803398875) % 1.0  # golden ratio: consecutive ids are far apart in hue
    value = np.where(index == 0, 0.0, 0.95 - 0.35 * ((index // 3) % 2))
    channels = [np.clip(np.abs((hue * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)]
    return (np.stack(channels, -1) * value[:, None] * 255).round().astype(np.uint8)


def colourise(labels: np.ndarray, label_map: LabelMap | None = None) -> np.ndarray:
    """Return integer labels (..., H, W) as a picture, uint8 (..., H, W, 3), in which ids outside the map are white.

    The default label map is CelebAMask-HQ's.
    """
    label_map = label_map or load_label_map()
    table = np.full((65536, 3), 255, np.uint8)
    table[list(label_map.ids)] = np.array(label_map.colors, np.uint8)
    return table[np.clip(np.asarray(labels), 0, 65535)]

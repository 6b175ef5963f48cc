"""InputSpec: description of an encoder's input, in plain values that a checkpoint stores for prediction."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from psp_lightning.data.sources import SOURCES, Source
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.pictures import ImageLike

KINDS = tuple(SOURCES)
INTERPOLATIONS = ("nearest", "legacy_bilinear")


@dataclass(frozen=True)
class InputSpec:
    """The source images of a task.

    Args:
        kind: `rgb` (3 channels in [-1, 1]), `sketch` (1 channel in [0, 1]), `labels` (one-hot, one channel per class),
            `lowres` (3 channels in [-1, 1], down-sampled and resized to `size`) or `masked` (3 channels in [-1, 1], 0
            in the hole, and a fourth for the hole: 1 inside, 0 outside).
        size: height and width of the tensor in pixels.
        n_classes: number of classes of `labels`.
        interpolation: how label maps are resized: `nearest`, or `legacy_bilinear`, which mixes ids at edges. Use the
            latter only with the released segmentation weights, which were trained that way.
        factors: down-sampling factors of `lowres`.
        label_map: ids, names and colours of `labels` from `LabelMap.to_dict()`. None: the ids 0..n_classes-1.
        mask: options of `psp_lightning.data.masks.draw_mask` for the holes of `masked`.
        task: name of the task if its output does not fit into the place of the source: `frontalization`. None: it fits,
            or this is not known.

    Raises:
        UserError: if the kind or interpolation is unknown, or a number is out of range.
    """

    kind: str
    size: int = 256
    n_classes: int = 0
    interpolation: str = "nearest"
    factors: tuple[int, ...] = ()
    label_map: dict[str, Any] | None = None
    mask: dict[str, Any] = field(default_factory=dict)
    task: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"Unknown input kind {self.kind!r}. Known: {', '.join(KINDS)}.{suggest(self.kind, KINDS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"Unknown interpolation {self.interpolation!r} for label maps. Known: {', '.join(INTERPOLATIONS)}."
                f"{suggest(self.interpolation, INTERPOLATIONS)}"
            )
        plain = {
            "size": int(self.size),
            "factors": tuple(int(factor) for factor in self.factors or ()),
            "label_map": None if self.label_map is None else dict(self.label_map),
            "mask": dict(self.mask or {}),
            "n_classes": self.n_classes or (len(self.label_map["classes"]) if self.label_map else 0),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.size < 1:
            raise UserError(f"The input size must be a positive number of pixels, not {self.size}.")
        if self.kind == "labels" and self.n_classes < 2:
            raise UserError(f"Input kind 'labels' needs n_classes >= 2 (CelebAMask-HQ has 19), not {self.n_classes}.")
        if bad := [factor for factor in self.factors if not 1 <= factor <= self.size]:
            raise UserError(f"Down-sampling factor {bad[0]} does not fit {self.size} px. Use 1 to {self.size}.")

    @functools.cached_property
    def source(self) -> Source:
        """The converter of images of this kind."""
        kind = SOURCES[self.kind]
        return kind(**{item.name: getattr(self, item.name) for item in fields(kind)})

    @property
    def channels(self) -> int:
        """Number of channels of the source tensor."""
        return self.source.channels

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as strings, numbers, lists and dicts; without `task` if it is None."""
        values = {**asdict(self), "factors": list(self.factors)}
        return {key: value for key, value in values.items() if key != "task" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        """Build a spec from the dict of `to_dict`. Missing entries take their defaults.

        Raises:
            UserError: if the kind is missing or a key is unknown.
        """
        names = [item.name for item in fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"Unknown entry {key!r} of an input description.{suggest(key, names)}")
        if "kind" not in values:
            raise UserError(f"An input description needs 'kind', one of {', '.join(KINDS)}.")
        return cls(**values)


def load_source(picture: ImageLike, spec: InputSpec, **given: Any) -> Tensor:
    """Return a picture as the input of an encoder with this `spec`. `Source.load` describes the arguments."""
    return spec.source.load(picture, **given)


def source_to_rgb(x: Tensor, spec: InputSpec) -> Tensor:
    """Return a source batch (B, spec.channels, H, W) as pictures, float32 (B, 3, H, W) in [-1, 1], on the CPU."""
    return spec.source.to_rgb(x.detach().float().cpu())

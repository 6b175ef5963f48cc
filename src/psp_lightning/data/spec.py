"""InputSpec: what an encoder's input is. Plain values, so that a checkpoint carries it from training to prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from psp_lightning.utils.errors import UserError, suggest

KINDS = ("rgb", "sketch", "labels", "lowres", "masked")
INTERPOLATIONS = ("nearest", "legacy_bilinear")


@dataclass(frozen=True)
class InputSpec:
    """The source image of a task.

    Args:
        kind: `rgb` (3 channels in [-1, 1]), `sketch` (1 channel in [0, 1]), `labels` (one-hot, one channel a class),
            `lowres` (3 channels in [-1, 1], degraded and brought back to `size`) or `masked` (3 channels in [-1, 1]
            with the hole at 0, then the hole itself: 1 inside, 0 outside).
        size: height and width in pixels of the tensor that the encoder gets.
        n_classes: number of classes of `labels`.
        interpolation: how label maps are resized: `nearest`, or `legacy_bilinear` as the released segmentation
            weights were trained with (it mixes the ids at edges; for those weights only).
        factors: the down-sampling factors of `lowres`.
        label_map: ids, names and colours of `labels` as `LabelMap.to_dict()` gives them; None: the ids 0..n_classes-1.
        mask: how holes of `masked` are drawn, see `psp_lightning.data.masks.draw_mask`.

    Raises:
        UserError: for an unknown kind or interpolation, or numbers that make no sense.
    """

    kind: str
    size: int = 256
    n_classes: int = 0
    interpolation: str = "nearest"
    factors: tuple[int, ...] = ()
    label_map: dict[str, Any] | None = None
    mask: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"Unknown input kind {self.kind!r}; known: {', '.join(KINDS)}.{suggest(self.kind, KINDS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"Unknown interpolation {self.interpolation!r} for label maps; known: {', '.join(INTERPOLATIONS)}."
                f"{suggest(self.interpolation, INTERPOLATIONS)}"
            )
        object.__setattr__(self, "size", int(self.size))
        object.__setattr__(self, "factors", tuple(int(factor) for factor in self.factors or ()))
        object.__setattr__(self, "mask", dict(self.mask or {}))
        if self.label_map is not None:
            object.__setattr__(self, "label_map", dict(self.label_map))
            if not self.n_classes:
                object.__setattr__(self, "n_classes", len(self.label_map["classes"]))
        if self.size < 1:
            raise UserError(f"The input size must be a positive number of pixels, not {self.size}.")
        if self.kind == "labels" and self.n_classes < 2:
            raise UserError(f"Input kind 'labels' needs n_classes >= 2 (CelebAMask-HQ has 19), not {self.n_classes}.")
        if bad := [factor for factor in self.factors if not 1 <= factor <= self.size]:
            raise UserError(f"Down-sampling factor {bad[0]} does not fit {self.size} px; use 1..{self.size}.")

    @property
    def channels(self) -> int:
        """Channels of the source tensor."""
        return {"rgb": 3, "sketch": 1, "labels": self.n_classes, "lowres": 3, "masked": 4}[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        return {**asdict(self), "factors": list(self.factors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        """The inverse of `to_dict`; what is left out takes its default.

        Raises:
            UserError: for a missing kind or an unknown key.
        """
        names = [item.name for item in fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"Unknown entry {key!r} of an input description.{suggest(key, names)}")
        if "kind" not in values:
            raise UserError(f"An input description needs 'kind', one of {', '.join(KINDS)}.")
        return cls(**values)

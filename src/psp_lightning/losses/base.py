"""The base class of loss terms, its inputs and outputs, the registry, and the face crop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from psp_lightning.utils.registry import register

# Rows and columns of the face in an aligned 256 x 256 image (FFHQ crop)
FACE_ROWS = (35, 223)
FACE_COLUMNS = (32, 220)
FACE_REFERENCE_SIZE = 256


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a loss term.

    Attributes:
        y_hat: (B, 3, S, S) float, the output, nominally in [-1, 1] but not clamped.
        y: (B, 3, S, S) float in [-1, 1], the target.
        x: (B, C, S', S') float, the source; if source and target are the same image, it is the same object as `y`.
        delta_w_plus: (B, n_styles, style_dim) float, the encoder's output before the average latent is added.
        w_plus: (B, n_styles, style_dim) float, the codes that the generator received.
        latent_avg: (n_styles, style_dim) float, the average latent.
        codes: (B, n_styles, style_dim) float, the codes that generated samples were drawn from, 0 for other samples;
            None if no sample was generated.
        generated: (B,) float, 1 for generated samples and 0 for others.
    """

    y_hat: Tensor
    y: Tensor
    x: Tensor | None = None
    delta_w_plus: Tensor | None = None
    w_plus: Tensor | None = None
    latent_avg: Tensor | None = None
    codes: Tensor | None = None
    generated: Tensor | None = None

    def float(self) -> LossInputs:
        """Return the inputs in float32; if `x` and `y` are one object, they stay one."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value.float() for name, value in values.items() if value is not None}
        if self.x is self.y:
            changed["x"] = changed["y"]
        return replace(self, **changed)


class TermOutput(NamedTuple):
    """The value of a term, and further values for the log.

    Attributes:
        value: scalar with a graph.
        logs: detached scalars by full log name.
    """

    value: Tensor
    logs: dict[str, Tensor]


class LossTerm(nn.Module, ABC):
    """A term of the training objective.

    Subclasses implement `forward`, which runs in float32 with autocast off (see `CompositeLoss`). It must not modify
    its inputs or wait for the device (no `.item()`). `register_loss` sets `name`. `convention` says, for tables of
    results, with which network the term compares images; `face_convention` says it for faces that are cut out already.
    `needs` names inputs without which `CompositeLoss` leaves the term out.
    """

    name: str = ""
    convention: str = ""
    needs: tuple[str, ...] = ()
    face_convention: str = ""

    @abstractmethod
    def forward(self, inputs: LossInputs) -> Tensor | TermOutput:
        """Return the unweighted value, a scalar averaged over the batch; optionally, return further values to log."""


LOSSES: dict[str, type[LossTerm]] = {}
Term = TypeVar("Term", bound=type[LossTerm])


def register_loss(name: str) -> Callable[[Term], Term]:
    """Decorate a `LossTerm` to register it in `LOSSES` under `name`, which is also its key in the log.

    Raises:
        UserError: another loss has this name.
    """

    def decorate(cls: Term) -> Term:
        register(LOSSES, name, cls)
        cls.name = name
        return cls

    return decorate


def face_crop(image: Tensor) -> Tensor:
    """Crop the face of an aligned image: rows 35:223 and columns 32:220 of 256 px, scaled to the image.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, C, about 0.734 H, about 0.734 W), a view.

    Source: the identity loss and the cropped losses of pSp's code, for 256 px.
    """
    height, width = image.shape[-2:]
    top, bottom = (round(edge * height / FACE_REFERENCE_SIZE) for edge in FACE_ROWS)
    left, right = (round(edge * width / FACE_REFERENCE_SIZE) for edge in FACE_COLUMNS)
    return image[..., top:bottom, left:right]


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Disable autocast on `device`: frozen networks and sums over pixels lose too much precision in 16 bits."""
    return torch.autocast(device_type=device.type, enabled=False)

"""Drawn faces as tensors, for measurements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.utils.images import from_uint8

HELD_OUT = 5  # a seed that no training uses: generator and encoders train on 1, the identity network on 11


class Faces(NamedTuple):
    """Drawn faces."""

    images: Tensor  # float32 (n, 3, 64, 64) in [-1, 1]
    sketches: Tensor  # float32 (n, 1, 64, 64) in [0, 1]
    labels: np.ndarray  # uint8 (n, 64, 64)


def draw(seed: int, n: int, start: int = 0) -> Faces:
    """Return samples `start` to `start + n` of the faces of `seed`."""
    faces = ToyFaces(64, seed=seed, n=start + n)
    drawings = [faces.draw(i) for i in range(start, start + n)]
    images = torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2).contiguous()
    sketches = torch.from_numpy(np.stack([d.sketch for d in drawings]))[:, None].float() / 255
    return Faces(from_uint8(images), sketches, np.stack([d.labels for d in drawings]))

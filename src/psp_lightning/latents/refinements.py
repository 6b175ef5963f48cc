"""Files for what an inversion contains besides its codes: a change of a feature map, or of the generator's weights.

Each image has its own file, in float16, so that a folder of any size is written and read image by image. A change of a
16 x 16 feature map with 64 channels takes 33 kB, a change of a 64 x 64 map with 512 channels 4 MB, and the weights of a
1024 px generator take about 60 MB.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from psp_lightning.checkpoints.safetensors_io import read_described, save_described
from psp_lightning.models.inversion import Inversion, Weights
from psp_lightning.utils.errors import UserError

FOLDER = "refinements"  # in the output folder, next to the codes
KIND = "refinement"
FEATURES, WEIGHTS = "features", "weights."


def save_refinement(
    path: str | os.PathLike[str], inversion: Inversion, generator: str, checkpoint: str | None = None
) -> None:
    """Write the features and weights of one image in float16.

    Args:
        path: file to write.
        inversion: inversion of one image, with features or weights.
        generator: `generator_hash` of the generator.
        checkpoint: name of the generator's file, used in messages.

    Raises:
        UserError: a value is too large for float16.
        OSError: the file cannot be written; an existing file is not changed.
    """
    tensors = {} if inversion.features is None else {FEATURES: inversion.features[0]}
    if inversion.weights is not None:
        tensors |= {WEIGHTS + name: difference for name, difference in inversion.weights[0].items()}
    facts = {"generator": {"sha256": generator, "checkpoint": checkpoint}}
    save_described(path, KIND, tensors, facts, torch.float16)


def read_refinement(path: Path, generator: str | None) -> tuple[Tensor | None, Weights | None]:
    """Read the features (channels, r, r) and weights of one image, in float32.

    Args:
        path: file that `save_refinement` wrote.
        generator: `generator_hash` that the file must name; None accepts any.

    Raises:
        UserError: the file does not exist, is damaged, or belongs to another generator.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, but the latents were written with it. Give its folder as refinements=DIR, or set "
            "refine=none to decode only the codes."
        )
    facts, tensors = read_described(path, KIND)
    named = facts.get("generator")
    found = named.get("sha256") if isinstance(named, dict) else None
    if generator is not None and found != generator:
        raise UserError(
            f"{path} belongs to another generator (hash {str(found)[:16]} instead of {generator[:16]}): decode it with "
            "the checkpoint that made it."
        )
    weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    features = tensors.get(FEATURES)
    if features is not None and features.ndim != 3:
        raise UserError(f"{path} is damaged: its features have the shape {tuple(features.shape)}.")
    return features, weights or None

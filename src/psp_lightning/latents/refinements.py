"""Files for what an inversion contains besides its codes: a change of a feature map, or of the generator's weights.

Each image has its own file, in float16, so that a folder of any size is written and read image by image. A change of a
16 x 16 feature map with 64 channels takes 33 kB, a change of a 64 x 64 map with 512 channels 4 MB, and the weights of a
1024 px generator take about 60 MB.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

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
        inversion: inversion of one image, with features or weights. The file names the hash of its code.
        generator: `generator_hash` of the generator.
        checkpoint: name of the generator's file, used in messages.

    Raises:
        UserError: a value is too large for float16.
        OSError: the file cannot be written; an existing file is not changed.
    """
    tensors = {} if inversion.features is None else {FEATURES: inversion.features[0]}
    if inversion.weights is not None:
        tensors |= {WEIGHTS + name: difference for name, difference in inversion.weights[0].items()}
    for name, tensor in tensors.items():
        if (largest := tensor.abs().max()) > torch.finfo(torch.float16).max:
            raise UserError(
                f"{name} has values up to {largest:.3g}, too large for float16. Set latents=false, or lower refine.lr "
                "if they were optimised."
            )
    code = code_hash(inversion.w_plus[0])
    facts = {"generator": {"sha256": generator, "checkpoint": checkpoint}, "code_sha256": code}
    save_described(path, KIND, tensors, facts, torch.float16)


def as_stored(inversion: Inversion) -> Inversion:
    """Return an inversion whose features and weights are rounded as their file rounds them.

    Values that are too large for float16 are kept, and `save_refinement` reports them.
    """

    def rounded(tensor: Tensor) -> Tensor:
        half = tensor.to(torch.float16).to(tensor.dtype)
        return torch.where(half.isfinite(), half, tensor)

    features = None if inversion.features is None else rounded(inversion.features)
    weights = inversion.weights and tuple(
        {name: rounded(difference) for name, difference in one.items()} for one in inversion.weights
    )
    return Inversion(inversion.w_plus, features, weights)


def code_hash(w_plus: Tensor) -> str:
    """Return the SHA-256 of the float32 numbers of one code (n_styles, style_dim)."""
    return hashlib.sha256(w_plus.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def read_refinement(
    path: Path, generator: nn.Module, digest: str | None, code: Tensor | None
) -> tuple[Tensor | None, Weights | None]:
    """Read the features (channels, r, r) and weights of one image, in float32.

    Args:
        path: file that `save_refinement` wrote.
        generator: the generator that will decode them.
        digest: `generator_hash` that the file must name; None accepts any.
        code: the code (n_styles, style_dim) that the file must have been written with; None accepts any.

    Raises:
        UserError: the file does not exist, is damaged, or belongs to another generator or code.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, but the latents were written with it. Give its folder as refinements=DIR, or set "
            "refine=none to decode only the codes."
        )
    facts, tensors = read_described(path, KIND)
    named = facts.get("generator")
    found = named.get("sha256") if isinstance(named, dict) else None
    if digest is not None and found != digest:
        raise UserError(
            f"{path} belongs to another generator (hash {str(found)[:16]} instead of {digest[:16]}): decode it with "
            "the checkpoint that made it."
        )
    if code is not None and facts.get("code_sha256") != code_hash(code):
        raise UserError(
            f"{path} was written with another code than the one in the latents. If you edited the code, give "
            "refinements=DIR; otherwise run the prediction again."
        )
    weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    features = tensors.get(FEATURES)
    if features is None and not weights:
        raise UserError(f"{path} is damaged: it contains neither features nor weights.")
    if any(not part.is_floating_point() for part in tensors.values()) or (features is not None and features.ndim != 3):
        raise UserError(f"{path} is damaged: its values must be floating-point numbers, and its features 3D.")
    if features is not None:
        side = features.shape[-1]
        expected = (getattr(generator, "feature_channels", {}).get(side), side, side)
        if tuple(features.shape) != expected:
            raise UserError(
                f"{path} has features of shape {tuple(features.shape)}, but this generator has {expected[0] or 'no'} "
                f"channels at {side} px."
            )
    shapes = {name: parameter.shape for name, parameter in generator.named_parameters()}
    for name, value in weights.items():
        if shapes.get(name) != value.shape:
            raise UserError(f"{path} changes the weight {name}, which this generator lacks or has in another shape.")
    return features, weights or None

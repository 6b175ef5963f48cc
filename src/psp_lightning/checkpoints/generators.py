"""Generator files of ours: weights of a StyleGAN2 generator with everything that is needed to use them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.described import save_described
from psp_lightning.models.stylegan2 import Generator

LATENT_SAMPLES, LATENT_SEED = 100_000, 0


def save_generator(
    path: str | os.PathLike[str],
    generator: Generator,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `generator` as a self-describing safetensors file.

    Stored: the weights in the published layout; `latent_avg` (style_dim,), the mean w of 100,000 draws with a fixed
    seed; size, channels, depth, style_dim, value range, and `origin` (training data, licence, images shown, ...).

    Args:
        dtype: of the stored weights; None keeps theirs.
    """
    average = generator.latent_average(LATENT_SAMPLES, LATENT_SEED)
    description = {
        "generator": {"class": type(generator).__name__, **generator.config},
        "value_range": [-1, 1],
        "latent_avg": f"mean of {LATENT_SAMPLES} mapped draws, seed {LATENT_SEED}",
        "origin": dict(origin or {}),
    }
    save_described(path, "generator", {**generator.state_dict(), "latent_avg": average}, description, dtype)


def split_average(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The generator's own tensors, and the average latent."""
    return {name: t for name, t in tensors.items() if name != "latent_avg"}, tensors.get("latent_avg")

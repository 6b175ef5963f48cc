"""The one door to networks in files: runs, files of ours, shipped weights, and released files of others.

A path is resolved once and its file is read once. Files of ours are understood by `checkpoints/weight_files.py`,
others by `importers/published.py`. NVIDIA's pickles are converted first, see `importers/imports.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psp_lightning.checkpoints.read import read_weights, resolve, select
from psp_lightning.checkpoints.safetensors_io import read_described
from psp_lightning.checkpoints.strict import build_and_load, first, wrap_errors
from psp_lightning.checkpoints.weight_files import (
    restore_embedding,
    restore_generator,
    restore_psp,
    restore_trained,
    trained_state,
)  # fmt: skip
from psp_lightning.importers.published import generator_tensors, infer_generator, is_generator_state, load_released
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo import locate


def load_psp(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PSP:
    """Load a trained pSp network in eval mode.

    Args:
        path: a run folder (best checkpoint, else the last), a checkpoint of ours, a safetensors file of `save_psp`, a
            released pSp, e4e or ReStyle `.pt`, or the name of shipped weights, as `toyfaces/inversion`.
        device: where the network goes.

    Raises:
        UserError: `path` holds something else; the message says what.
    """
    path = resolve(path)
    return _psp(path, *read_weights(path, "psp")).eval().to(device)


def load_pretrained(name: str, device: str | torch.device = "cpu") -> PSP:
    """Load a shipped pSp network in eval mode.

    Args:
        name: as `toyfaces/inversion`; no path.
        device: where the network goes.

    Raises:
        UserError: an unknown name, with the known ones; shipped weights of something else.
    """
    known = [entry.name for entry in locate.shipped().values() if entry.kind == "psp"]
    if name not in known:
        options = ", ".join(known) or "none"
        raise UserError(f"No pSp network of this package is called {name!r}.{suggest(name, known)} Known: {options}.")
    path = locate.find_shipped(name)
    return restore_psp(path, *read_described(path, "psp")).eval().to(device)


def load_generator(path: str | os.PathLike[str]) -> tuple[Generator, Tensor | None]:
    """Load a StyleGAN2 generator and its average latent, where the file has one.

    Args:
        path: a safetensors file of `save_generator`, or the run folder in which psp-train-generator wrote one; a
            converted generator (`g_ema`, published PyTorch layout); any checkpoint that `load_psp` reads; the name of
            shipped weights, as `toyfaces/generator`.

    Returns:
        The generator in eval mode on the CPU, size and widths read off the tensors, and latent_avg (style_dim,) or
        (n_styles, style_dim), or None.

    Raises:
        UserError: `path` holds no generator.
    """
    path = resolve(path, generator=True)
    generator, average = _generator(path, *read_weights(path, "generator", "psp"))
    return generator.eval(), average


def load_decoder(path: str | os.PathLike[str]) -> PSP:
    """Load the network of a checkpoint for its generator; a generator alone becomes one without an encoder.

    Args:
        path: as in `load_psp` and `load_generator`.

    Raises:
        UserError: as `load_psp`.
    """
    path = resolve(path, generator=True)
    description, content = read_weights(path, "psp", "generator")
    try:
        if description is None or description["kind"] == "psp":
            return _psp(path, description, content).eval()
        refused = None
    except UserError as error:  # an encoder that is not built here may still come with a generator that is
        refused = error
    try:
        generator, average = _generator(path, description, content)
    except UserError as error:
        raise refused or error from None
    return PSP(nn.Identity(), generator, average, start_from_latent_avg=average is not None).eval()


def load_embedding(path: str | os.PathLike[str]) -> Any:
    """Load an embedding in eval mode on the CPU.

    Args:
        path: a file of `save_embedding`, or the name of shipped weights, as `toyfaces/identity`.

    Raises:
        UserError: no such file; it is damaged, of another kind, names a class that is not registered, or does not fit
            its description.
    """
    path = resolve(path)
    return restore_embedding(path, *read_described(path, "embedding")).eval()


def _psp(path: Path, description: Mapping[str, Any] | None, content: Mapping[str, Any]) -> PSP:
    """Make the pSp network of what `read_weights` gave."""
    if description is not None:
        return restore_psp(path, description, content)
    with wrap_errors(path):
        return restore_trained(content) if "psp" in content else load_released(content)


def _generator(
    path: Path, description: Mapping[str, Any] | None, content: Mapping[str, Any]
) -> tuple[Generator, Tensor | None]:
    """Make the generator of what `read_weights` gave, and its average latent."""
    if description is not None:
        return restore_generator(path, description, content)
    with wrap_errors(path):
        if "psp" in content:
            trained = trained_state(content)
            state, average = select(trained, "generator."), trained.get("latent_avg")
        else:
            state, average = generator_tensors(content), content.get("latent_avg")
        if not is_generator_state(state):
            raise UserError(f"this holds no StyleGAN2 generator; its keys are: {first(map(str, state)) or 'none'}.")
        config = infer_generator(state)
        # noise maps are missing in early converted files
        generator = build_and_load(lambda: Generator(**config), state, "the generator", ["noises.*"])
        if average is not None and (not isinstance(average, Tensor) or average.shape[-1:] != (generator.style_dim,)):
            raise UserError(f"its 'latent_avg' does not fit a style of {generator.style_dim} numbers.")
    return generator, average

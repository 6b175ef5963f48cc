"""Load networks from files: runs, self-describing files, shipped weights, and released checkpoints of other projects.

A path is resolved once and its file is read once. `checkpoints/weight_files.py` interprets this library's files, and
`importers/published.py` interprets the files of other projects. NVIDIA's pickles must be converted first; see
`importers/imports.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psp_lightning.checkpoints import weight_files
from psp_lightning.checkpoints.read import read_weights, resolve, select
from psp_lightning.checkpoints.safetensors_io import read_described
from psp_lightning.checkpoints.strict import first, wrap_errors
from psp_lightning.importers.published import (
    build_generator,
    generator_tensors,
    import_hint,
    is_generator_state,
    latent_average,
    load_released,
)
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo import locate


def load_psp(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PSP:
    """Load a trained pSp network in eval mode.

    Args:
        path: a run folder (its best checkpoint, otherwise its last), a psp-train checkpoint, a safetensors file of
            `save_psp`, a released pSp, e4e or ReStyle `.pt`, or the name of shipped weights like `toyfaces/inversion`.

    Raises:
        UserError: `path` contains something else; the message says what.
    """
    path = resolve(path)
    return _psp(path, *read_weights(path, "psp")).eval().to(device)


def load_pretrained(name: str, device: str | torch.device = "cpu") -> PSP:
    """Load a shipped pSp network in eval mode.

    Args:
        name: a name such as `toyfaces/inversion`, not a path.

    Raises:
        UserError: no shipped pSp network has this name; the message lists them.
    """
    known = [entry.name for entry in locate.shipped().values() if entry.kind == "psp"]
    if name not in known:
        options = ", ".join(known) or "none"
        raise UserError(f"No shipped pSp network is called {name!r}.{suggest(name, known)} Known: {options}.")
    path = locate.find_shipped(name)
    return weight_files.restore_psp(path, *read_described(path, "psp")).eval().to(device)


def load_generator(path: str | os.PathLike[str]) -> tuple[Generator, Tensor | None]:
    """Load a StyleGAN2 generator and, if the file has one, its average latent.

    Args:
        path: a safetensors file of `save_generator`, or a psp-train-generator run folder with one; a converted
            generator (`g_ema`, published PyTorch layout); any checkpoint that `load_psp` reads; or the name of shipped
            weights such as `toyfaces/generator`.

    Returns:
        The generator in eval mode on the CPU, with size and widths inferred from the tensors, and latent_avg
        (style_dim,) or (n_styles, style_dim), or None.

    Raises:
        UserError: `path` contains no generator.
    """
    path = resolve(path, generator=True)
    return restore_any_generator(path, *read_weights(path, "generator", "psp"))


def load_decoder(path: str | os.PathLike[str]) -> PSP:
    """Load a network for its generator: a pSp network, or a generator in a network without an encoder.

    Args:
        path: see `load_psp` and `load_generator`.

    Raises:
        UserError: see `load_psp`.
    """
    path = resolve(path, generator=True)
    description, content = read_weights(path, "psp", "generator")
    try:
        if description is None or description["kind"] == "psp":
            return _psp(path, description, content).eval()
        refused = None
    except UserError as error:  # an unsupported encoder may still come with a supported generator
        refused = error
    try:
        generator, average = restore_any_generator(path, description, content)
    except UserError as error:
        raise refused or error from None
    return PSP(nn.Identity(), generator, average, start_from_latent_avg=average is not None).eval()


def load_embedding(path: str | os.PathLike[str]) -> Any:
    """Load an embedding in eval mode on the CPU.

    Args:
        path: a file of `save_embedding`, or the name of shipped weights such as `toyfaces/identity`.

    Raises:
        UserError: the file does not exist, is damaged or of another kind, names a class that is not registered, or
            does not fit its description.
    """
    path = resolve(path)
    return weight_files.restore_embedding(path, *read_described(path, "embedding")).eval()


def _psp(path: Path, description: Mapping[str, Any] | None, content: Mapping[str, Any]) -> PSP:
    """Build a pSp network from the result of `read_weights`."""
    if description is not None:
        return weight_files.restore_psp(path, description, content)
    with wrap_errors(path):
        return weight_files.restore_trained(content) if "psp" in content else load_released(content)


def restore_any_generator(
    path: Path, description: Mapping[str, Any] | None, content: Mapping[str, Any]
) -> tuple[Generator, Tensor | None]:
    """Build a generator and its average latent from the result of `read_weights`; see `load_generator`."""
    if description is not None:
        generator, average = weight_files.restore_generator(path, description, content)
        return generator.eval(), average
    with wrap_errors(path):
        if "psp" in content:
            trained = weight_files.trained_state(content)
            state, average = select(trained, "generator."), trained.get("latent_avg")
        else:
            state, average = generator_tensors(content), latent_average(content)
        if not is_generator_state(state):
            hint = import_hint(content) or f"Its keys are: {first(map(str, state)) or 'none'}."
            raise UserError(f"this contains no StyleGAN2 generator in the published layout. {hint}")
        generator = build_generator(state)
        if average is not None and (not isinstance(average, Tensor) or average.shape[-1:] != (generator.style_dim,)):
            raise UserError(f"its 'latent_avg' does not fit a style of {generator.style_dim} numbers.")
    return generator.eval(), average

"""Reading and writing checkpoints: never runs code from a file, never loads half of one in silence."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.safetensors_io import is_safetensors
from psp_lightning.checkpoints.strict import LoadReport as LoadReport
from psp_lightning.checkpoints.strict import build_and_load, first, understanding
from psp_lightning.checkpoints.strict import load_strict as load_strict
from psp_lightning.checkpoints.strict import resolve as resolve
from psp_lightning.checkpoints.torch_files import read_torch
from psp_lightning.checkpoints.weight_files import read_generator, read_psp
from psp_lightning.importers import published as convert
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError, check_tree, suggest
from psp_lightning.zoo import locate as pretrained

NET = "net."  # prefix of the PSP in a training module's state dict


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict in a checkpoint file, tensors on the CPU. Holds tensors and plain values only; no code runs.

    Args:
        path: a file, or a run folder (see `resolve`).

    Raises:
        UserError: for anything that is not a readable checkpoint; the message says what it is instead.
    """
    path = resolve(path)
    content = read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict.")
    return content


def load_psp(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PSP:
    """A trained pSp network in eval mode.

    Args:
        path: a run folder (best checkpoint, else the last), a checkpoint of ours, a safetensors file of `save_psp`, a
            released pSp `.pt`, or the name of shipped weights, as `toyfaces/inversion`.
        device: where the network goes.

    Raises:
        UserError: when `path` holds something else; the message says what.
    """
    path = resolve(path)
    if is_safetensors(path):
        return read_psp(path).eval().to(device)
    content = read(path)
    with understanding(path):
        net = _ours(content) if "psp" in content else released(content)
    return net.eval().to(device)


def load_pretrained(name: str, device: str | torch.device = "cpu") -> PSP:
    """A shipped pSp network in eval mode.

    Args:
        name: as `toyfaces/inversion`; no path.
        device: where the network goes.

    Raises:
        UserError: an unknown name, with the known ones; shipped weights of something else.
    """
    known = [entry.name for entry in pretrained.shipped().values() if entry.kind == "psp"]
    if name not in known:
        options = ", ".join(known) or "none"
        raise UserError(f"No pSp network of this package is called {name!r}.{suggest(name, known)} Known: {options}.")
    return read_psp(pretrained.find(name)).eval().to(device)


def tensors_of(content: Mapping[str, Any], key: str = "state_dict") -> dict[str, Any]:
    """The state dict under `key`, or `content` itself, without the prefixes of wrappers."""
    state = content.get(key, content)
    if not isinstance(state, Mapping):
        raise UserError(f"its {key!r} is a {type(state).__name__}, not a dict of tensors.")
    return convert.convert_wrapped({str(k): v for k, v in state.items()})


def _ours(content: Mapping[str, Any]) -> PSP:
    state = convert.select(tensors_of(content), NET)
    check_tree(content["psp"], "description")
    return build_and_load(lambda: PSP.from_description(content["psp"]), state, "PSP")


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    opts = content.get("opts", {})
    if not isinstance(opts, Mapping):
        raise UserError(f"its 'opts' are a {type(opts).__name__}, not a dict.")
    check_tree(opts, "opts")
    return dict(opts)


def released(content: Mapping[str, Any], in_channels: int | None = None) -> PSP:
    """The network of a released pSp, e4e or ReStyle checkpoint.

    Args:
        content: of the file, see `read`.
        in_channels: of the encoder, where it shall not be what the file has; its first layer is adapted, see
            `psp_lightning.checkpoints.strict.adapt_channels`.

    Raises:
        UserError: something else, with what it is; an encoder that is not built here; tensors that do not fit each
            other.
    """
    state = tensors_of(content)
    encoder_state, decoder_state = convert.select(state, "encoder."), convert.select(state, "decoder.")
    if not encoder_state or not convert.is_generator_state(decoder_state):
        raise UserError(f"this is no pSp checkpoint. {_what_else(content, state)}")
    opts = _options(content)
    if reason := convert.why_not_built(encoder_state, opts):
        raise UserError(
            f"this is a ReStyle checkpoint: {reason}. Its generator and average latent: psp-weights import FILE out=..."
        )
    described = convert.infer_encoder(encoder_state, opts.get("encoder_type"))
    adapted = in_channels is not None and in_channels != described["in_channels"]
    restyle = opts.get("encoder_type") in convert.RESTYLE
    if restyle and adapted:
        raise UserError(f"in_channels={in_channels} is not for ReStyle's encoders, which take an image as well.")
    if restyle and "n_iters_per_batch" in opts:
        described["iterations"] = opts["n_iters_per_batch"]
    if in_channels is not None:
        described["in_channels"] = in_channels
    average = latent_average(content)
    start = restyle or bool(opts.get("start_from_latent_avg", average is not None))  # ReStyle does not ask the option
    if start and average is None:
        raise UserError("it starts from the average latent but holds no 'latent_avg'.")
    generator = convert.infer_generator(decoder_state)
    source = convert.convert_source({} if adapted else opts, described["in_channels"], described["input_size"])
    if adapted and source["kind"] == "labels":  # new to the network: no reason for the old way of resizing
        source["interpolation"] = "nearest"
    description = {
        "format": 1,
        "encoder": described,
        "generator": {"class": "Generator", **generator},
        "start_from_latent_avg": start,
        "source": source,
    }
    n_styles, style_dim = 2 * generator["output_size"].bit_length() - 4, generator["style_dim"]
    whole = {f"encoder.{key}": value for key, value in encoder_state.items()}
    whole |= {f"generator.{key}": value for key, value in decoder_state.items()}
    whole["latent_avg"] = (
        torch.zeros(n_styles, style_dim)
        if average is None
        else average.reshape(-1, style_dim).expand(n_styles, -1).to(torch.float32)
    )
    return build_and_load(
        lambda: PSP.from_description(description),
        whole,
        "PSP",
        allow_missing=["generator.noises.*"],
        adapt=["encoder.input_layer.0.weight"] if adapted else [],
    )


def latent_average(content: Mapping[str, Any]) -> Tensor | None:
    """`latent_avg` of a checkpoint, None where it has none.

    Raises:
        UserError: it is no tensor.
    """
    average = content.get("latent_avg")
    if average is not None and not isinstance(average, Tensor):
        raise UserError(f"its 'latent_avg' is a {type(average).__name__}, not a tensor.")
    return average


def _what_else(content: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    if "g_ema" in content or convert.is_generator_state(state):
        return "It is a StyleGAN2 generator without an encoder: use it as the generator's weights."
    keys = first(str(key) for key in state) or "none"
    return f"It has no encoder.* and decoder.* tensors; its keys are: {keys}."


def load_generator(path: str | os.PathLike[str]) -> tuple[Generator, Tensor | None]:
    """A StyleGAN2 generator and its average latent, if the file has one.

    Args:
        path: a safetensors file of `save_generator`, or the run folder in which psp-train-generator wrote one; a
            converted generator (`g_ema`, published PyTorch layout); any checkpoint that `load_psp` reads; the name of
            shipped weights, as `toyfaces/generator`.

    Returns:
        The generator in eval mode on the CPU, size and widths read off the tensors, and latent_avg (style_dim,) or
        (n_styles, style_dim), or None.

    Raises:
        UserError: when `path` holds no generator.
    """
    trained = Path(path).expanduser() / "generator.safetensors"
    path = trained if trained.is_file() else resolve(path)
    if is_safetensors(path):
        generator, average = read_generator(path)
        return generator.eval(), average
    content = read(path)
    with understanding(path):
        if "psp" in content:
            state = convert.select(tensors_of(content), NET)
            generator_state, average = convert.select(state, "generator."), state.get("latent_avg")
        else:
            state = tensors_of(content, "g_ema" if "g_ema" in content else "state_dict")
            decoder = convert.select(state, "decoder.")
            generator_state, average = decoder or convert.select(state, ""), content.get("latent_avg")
        if not convert.is_generator_state(generator_state):
            raise UserError(f"this holds no StyleGAN2 generator; its keys are: {first(map(str, state)) or 'none'}.")
        config = convert.infer_generator(generator_state)
        # noise maps are missing in early converted files
        generator = build_and_load(lambda: Generator(**config), generator_state, "the generator", ["noises.*"])
    if average is not None and (not isinstance(average, Tensor) or average.shape[-1:] != (generator.style_dim,)):
        raise UserError(f"Checkpoint {path}: its 'latent_avg' does not fit a style of {generator.style_dim} numbers.")
    return generator.eval(), average


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` through a temporary file in the same folder, so that `path` holds a whole file or none.

    Raises:
        OSError: when the disk is full or the folder cannot be written; nothing new stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):  # it may have been moved already
            os.unlink(name)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(error, RuntimeError):  # how PyTorch's writer says that the disk is full
            raise OSError(errno.ENOSPC, "cannot be written, the disk is probably full", os.fspath(path)) from error
        raise

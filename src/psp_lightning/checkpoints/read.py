"""Find a checkpoint and read what it holds. Nothing in a file is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from psp_lightning.checkpoints.file_kinds import file_kind
from psp_lightning.checkpoints.safetensors_io import read_described
from psp_lightning.checkpoints.torch_files import Placeholder, read_torch
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

RUN_FILES = ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt")
RUN_GENERATOR = "generator.safetensors"  # what psp-train-generator leaves in its run folder
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


def resolve(path: str | os.PathLike[str], generator: bool = False) -> Path:
    """Return the file that `path` means.

    Args:
        path: the file itself, a run folder (its best checkpoint, else the last), or, where no such file or folder
            exists, the name of shipped weights, as `toyfaces/inversion`.
        generator: take `generator.safetensors` of a run folder where it exists.

    Raises:
        UserError: nothing is there, or a folder without a checkpoint.
    """
    name, path = os.fspath(path), Path(path).expanduser()
    if path.is_dir():
        for file in (RUN_GENERATOR, *RUN_FILES) if generator else RUN_FILES:
            if (path / file).is_file():
                return path / file
        hidden = f" It hides the shipped weights {name}." if name in locate.shipped() else ""
        raise UserError(f"{path} is a folder without a checkpoint: looked for {', '.join(RUN_FILES[:2])}.{hidden}")
    if not path.exists():
        if locate.is_shipped_name(name):
            return locate.find_shipped(name)
        raise UserError(f"Checkpoint {path} does not exist.")
    if not path.is_file():
        raise UserError(f"Checkpoint {path} is not a regular file.")
    return path


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of torch.save: a dict of plain values and tensors, which are on the CPU.

    Args:
        path: as in `resolve`.

    Raises:
        UserError: anything else; the message says what the file is instead.
    """
    return read_checkpoint(resolve(path))


def read_checkpoint(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read as `read` does, from a file; `kind`: what `file_kind` said, where it was asked."""
    content = read_torch(path, kind)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict.")
    return content


def read_weights(path: Path, *kinds: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Read a file of weights: one of ours in safetensors, or a checkpoint of torch.save.

    Args:
        path: the file.
        kinds: kinds of safetensors files to accept; none: all.

    Returns:
        The description and the tensors of a safetensors file; None and the dict of a checkpoint.

    Raises:
        UserError: as in `read` and `read_described`.
    """
    kind = file_kind(path)
    return read_described(path, *kinds) if kind == "safetensors" else (None, read_checkpoint(path, kind))


def is_plain(value: Any) -> bool:
    """Return whether everything that was read is here, and no `Placeholder` stands for an object of another library."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return not isinstance(value, Placeholder)


def tensors_of(content: Mapping[str, Any], key: str = "state_dict") -> dict[str, Any]:
    """Return the state dict under `key`, or `content` itself, without the prefixes of wrappers.

    Raises:
        UserError: `key` holds no dict.
    """
    state = content.get(key, content)
    if not isinstance(state, Mapping):
        raise UserError(f"its {key!r} is a {type(state).__name__}, not a dict of tensors.")
    state = {str(name): value for name, value in state.items()}
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def select(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose key starts with `prefix`, without it."""
    return {
        key[len(prefix) :]: value
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }

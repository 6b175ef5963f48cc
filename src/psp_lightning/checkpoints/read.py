"""Find and read checkpoints. No code from a file is run."""

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
RUN_GENERATOR = "generator.safetensors"  # written by psp-train-generator
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


def resolve(path: str | os.PathLike[str], generator: bool = False) -> Path:
    """Return the file that `path` refers to.

    Args:
        path: a file; a run folder, whose best checkpoint is used, otherwise its last; or, if neither exists, the name
            of shipped weights such as `toyfaces/inversion`.
        generator: prefer a run folder's `generator.safetensors`.

    Raises:
        UserError: nothing exists at `path`, or it is a folder without a checkpoint.
    """
    name, path = os.fspath(path), Path(path).expanduser()
    if path.is_dir():
        for file in (RUN_GENERATOR, *RUN_FILES) if generator else RUN_FILES:
            if (path / file).is_file():
                return path / file
        hidden = f" It hides the shipped weights {name}." if name in locate.shipped() else ""
        raise UserError(f"{path} is a folder without a checkpoint: it has no {' or '.join(RUN_FILES[:2])}.{hidden}")
    if not path.exists():
        if locate.is_shipped_name(name):
            return locate.find_shipped(name)
        raise UserError(f"Checkpoint {path} does not exist.{locate.download_hint(path)}")
    if not path.is_file():
        raise UserError(f"Checkpoint {path} is not a regular file.")
    return path


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of torch.save: a dict of plain values and CPU tensors.

    Args:
        path: see `resolve`.

    Raises:
        UserError: the file is something else; the message says what.
    """
    return read_checkpoint(resolve(path))


def read_checkpoint(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read a file as `read` does; `kind` is the result of `file_kind`, if that is known already."""
    content = read_torch(path, kind)
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not the dict of a checkpoint.")
    return content


def read_weights(path: Path, *kinds: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Read a self-describing safetensors file or a checkpoint of torch.save.

    Args:
        kinds: the accepted kinds of safetensors files; all if none is given.

    Returns:
        The description and tensors of a safetensors file, or None and the dict of a checkpoint.

    Raises:
        UserError: see `read` and `read_described`.
    """
    kind = file_kind(path)
    return read_described(path, *kinds) if kind == "safetensors" else (None, read_checkpoint(path, kind))


def is_plain(value: Any) -> bool:
    """Return whether the content that was read has no `Placeholder` for an object of another library."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return not isinstance(value, Placeholder)


def tensors_of(content: Mapping[str, Any], key: str = "state_dict") -> dict[str, Any]:
    """Return the dict at `key`, by default `content`, without wrappers' prefixes; otherwise raise a UserError."""
    state = content.get(key, content)
    if not isinstance(state, Mapping):
        raise UserError(f"its {key!r} is a {type(state).__name__}, not a dict of tensors.")
    state = {str(name): value for name, value in state.items()}
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def select(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose key starts with `prefix`, with the prefix removed."""
    return {
        key[len(prefix) :]: value
        for key, value in state.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }

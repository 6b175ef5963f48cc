"""Self-describing weight files: safetensors whose header says what the tensors are and how to build their network.

The header's metadata holds one entry, `psp_lightning`, a JSON object with `kind` (`generator`, `psp` or `embedding`),
`format` and whatever else describes the file. Nothing in such a file can run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psp_lightning.utils.errors import UserError

KEY, FORMAT = "psp_lightning", 1


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins like one: eight bytes of length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27


def save_described(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a file through a temporary one beside it, so that `path` holds a whole file or none.

    Args:
        kind: what the file is.
        tensors: by name.
        description: plain values (JSON).
        dtype: of the stored floating-point tensors; None: as they are.

    Raises:
        OSError: when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().cpu().contiguous().clone()
        for name, t in tensors.items()
    }
    metadata = {KEY: json.dumps({"kind": kind, "format": FORMAT, **description}, sort_keys=True)}
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        save_file(stored, name, metadata=metadata)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, SafetensorError):
            raise OSError(28, f"cannot be written ({error})", os.fspath(path)) from error
        raise


def read_described(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors (floating-point ones as float32, on the CPU) of a file.

    Args:
        kind: what the file must be; None: anything.

    Raises:
        UserError: a damaged file, one without our description, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                names = ", ".join(list(file.keys())[:5])
                raise UserError(f"{path} is a safetensors file without psp_lightning's description; it holds {names}.")
            description = json.loads(metadata[KEY])
            if not isinstance(description, dict) or description.get("format") != FORMAT:
                raise UserError(f"{path} is of another format than this version reads ({FORMAT}).")
            if kind is not None and description.get("kind") != kind:
                raise UserError(f"{path} holds a {description.get('kind')}, not a {kind}.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no safetensors file ({reason[:200]}).") from None
    return description, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}

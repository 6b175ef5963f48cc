"""Self-describing weight files: safetensors whose header says what the tensors are and how to build their network.

The header's metadata has one entry, `psp_lightning`: a JSON object with `kind` (`generator`, `psp` or `embedding`),
`format` and further facts about the file. Nothing in such a file can run code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError, clean
from psp_lightning.utils.names import is_utf8

KEY, FORMAT = "psp_lightning", 1
HEADER_LIMIT = 4 << 20  # bytes; a network with a thousand tensors needs a tenth of a megabyte
STATISTICS = (".running_mean", ".running_var")  # small tensors with a wide range: never stored in half precision


def save_described(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a self-describing file atomically: `path` never contains part of a file.

    Args:
        kind: `generator`, `psp`, `embedding`, ...
        description: JSON values.
        dtype: dtype of the stored floating-point tensors, except running statistics of normalisation layers; None keeps
            their dtypes.

    Raises:
        UserError: a value is too large for `dtype`.
        ValueError, TypeError: the description contains NaN or values that JSON does not have.
        OSError: the disk is full or the folder is not writable.
    """
    path = Path(path)
    metadata = {KEY: json.dumps({**description, "kind": kind, "format": FORMAT}, sort_keys=True, allow_nan=False)}
    stored = {name: _stored(name, t.detach().cpu(), dtype) for name, t in tensors.items()}
    with replacing(path) as part:
        try:
            save_file(stored, part, metadata=metadata)
        except SafetensorError as error:
            raise OSError(errno.ENOSPC, "cannot be written, the disk is probably full") from error


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous copy in the dtype of the file."""
    if dtype is None or not tensor.is_floating_point() or name.endswith(STATISTICS):
        return tensor.contiguous().clone()
    rounded = tensor.to(dtype, copy=True).contiguous()
    if rounded.isfinite().sum() < tensor.isfinite().sum():
        raise UserError(
            f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}: store it in its own dtype."
        )
    return rounded


def read_described(path: str | os.PathLike[str], *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the description and the tensors of a self-describing file; floats become float32, on the CPU.

    Args:
        kinds: the accepted kinds; all if none is given.

    Raises:
        UserError: the file is damaged, has no description, is of another kind, or has weights that are not finite.
    """
    return check_described(path, *read_tensors(path), kinds)


def check_described(
    path: str | os.PathLike[str],
    description: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    kinds: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors unchanged; raise the errors of `read_described`."""
    if description is None:
        names = ", ".join(clean(repr(name), 60) for name in list(tensors)[:5]) or "nothing"
        raise UserError(f"{path} is a safetensors file without psp_lightning's description; it contains {names}.")
    if description.get("format") != FORMAT:
        raise UserError(f"{path} has a different format than this version reads ({FORMAT}).")
    if kinds and description.get("kind") not in kinds:
        kind = clean(repr(description.get("kind")), 60)
        raise UserError(f"{path} is of kind {kind}, not {' or '.join(map(repr, kinds))}.")
    for name, tensor in tensors.items():
        if tensor.is_complex() or not bool(tensor.isfinite().all()):
            what = "complex numbers" if tensor.is_complex() else "values that are not finite"
            raise UserError(f"{path} has {what} in {clean(repr(name), 60)}: its weights cannot be used.")
    return description, tensors


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read any safetensors file: psp_lightning's description, None if it has none, and the tensors.

    The tensors are copies on the CPU. Floats become float32, and no value is checked.

    Raises:
        UserError: the file is damaged.
    """
    with _opened(Path(path)) as file:
        text = (file.metadata() or {}).get(KEY)
        description = None if text is None else _parse(text)
        # copies, because safetensors returns views of the file
        return description, {name: _float32(file.get_tensor(name)) for name in file.keys()}


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read only the description of a safetensors file, an empty dict if it has none; errors as in `read_tensors`."""
    with _opened(Path(path)) as file:
        return _parse((file.metadata() or {}).get(KEY, "{}"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; report any damage as one message."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    size = int.from_bytes(head[:8], "little")
    if head[8:] != b"{" or size > HEADER_LIMIT:
        reason = f"a header of {size} bytes" if head[8:] == b"{" else "it does not begin like one"
        raise UserError(f"{path} is damaged or not a safetensors file ({reason}).")
    try:
        with open(path, "rb") as file:  # safetensors takes only names that are UTF-8
            name = path if is_utf8(path) else f"/dev/fd/{file.fileno()}"
            with safe_open(name, framework="pt", device="cpu") as tensors:
                yield tensors
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not a safetensors file ({reason[:200]}).") from None


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def _parse(text: str) -> dict[str, Any]:
    """Parse a description; return an empty dict, which has no valid format, for anything but a JSON object."""
    description = json.loads(text, parse_constant=_reject, parse_float=_finite, parse_int=_whole)
    return description if isinstance(description, dict) else {}


def _reject(text: str) -> float:
    raise ValueError(f"its description contains {text}")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _reject(text[:20])


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError("its description contains a number of more than 20 digits")
    return int(text)

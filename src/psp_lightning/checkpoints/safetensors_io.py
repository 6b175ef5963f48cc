"""Self-describing weight files: safetensors whose header says what the tensors are and how to build their network.

The header's metadata holds one entry, `psp_lightning`, a JSON object with `kind` (`generator`, `psp` or `embedding`),
`format` and whatever else describes the file. Nothing in such a file can run code.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError

KEY, FORMAT = "psp_lightning", 1
HEADER_LIMIT = 4 << 20  # bytes; the header of a network with a thousand tensors has a tenth of a megabyte
STATISTICS = (".running_mean", ".running_var")  # tiny, and of a wide range: never stored in half precision


def save_described(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a file through a temporary one beside it, so that `path` holds a whole file or none.

    Args:
        path: the file.
        kind: what the file is.
        tensors: by name.
        description: plain values (JSON).
        dtype: of the stored floating-point tensors, running statistics of normalisation excepted; None: as they are.

    Raises:
        UserError: a value that `dtype` cannot hold.
        ValueError, TypeError: the description holds NaN or other values than JSON's.
        OSError: when the disk is full or the folder cannot be written.
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
    """Return the tensor as it is stored: contiguous, with memory of its own."""
    if dtype is None or not tensor.is_floating_point() or name.endswith(STATISTICS):
        return tensor.contiguous().clone()
    rounded = tensor.to(dtype, copy=True).contiguous()
    if rounded.isfinite().sum() < tensor.isfinite().sum():
        raise UserError(
            f"{name} holds values up to {tensor.abs().max():.3g}, more than {dtype} can: store it as it is."
        )
    return rounded


def read_described(path: str | os.PathLike[str], *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read description and tensors (floating-point ones as float32, on the CPU) of a file of ours.

    Args:
        path: the file.
        kinds: what the file may be; none given: anything.

    Raises:
        UserError: a damaged file, one without our description, one of another kind, weights that are not finite.
    """
    return check_described(path, *read_tensors(path), kinds)


def check_described(
    path: str | os.PathLike[str],
    description: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    kinds: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return description and tensors unchanged, with the errors of `read_described`."""
    if description is None:
        names = ", ".join(_short(name) for name in list(tensors)[:5]) or "nothing"
        raise UserError(f"{path} is a safetensors file without psp_lightning's description; it holds {names}.")
    if description.get("format") != FORMAT:
        raise UserError(f"{path} is of another format than this version reads ({FORMAT}).")
    if kinds and description.get("kind") not in kinds:
        raise UserError(f"{path} is of kind {_short(description.get('kind'))}, not {' or '.join(map(repr, kinds))}.")
    for name, tensor in tensors.items():
        if tensor.is_complex() or not bool(tensor.isfinite().all()):
            what = "complex numbers" if tensor.is_complex() else "values that are not finite"
            raise UserError(f"{path} holds {what} in {_short(name)}: its weights cannot be used.")
    return description, tensors


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read any safetensors file: our description of it, None where it has none, and its tensors.

    Floating-point tensors become float32; all are copies on the CPU and may hold any values.

    Raises:
        UserError: a damaged file.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(KEY)
            description = None if text is None else _parse(text)
            # copies, because safetensors gives views of the file
            tensors = {name: _float32(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no safetensors file ({reason[:200]}).") from None
    return description, tensors


def _check_header(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    size = int.from_bytes(head[:8], "little")
    if head[8:] != b"{" or size > HEADER_LIMIT:
        reason = f"a header of {size} bytes" if head[8:] == b"{" else "it does not begin like one"
        raise UserError(f"{path} is damaged or no safetensors file ({reason}).")


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read only the description of a safetensors file that is known to be whole; an empty dict where it has none."""
    with safe_open(path, framework="pt") as file:
        return _parse((file.metadata() or {}).get(KEY, "{}"))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def _parse(text: str) -> dict[str, Any]:
    """Parse a description; what is no JSON object becomes an empty one, which is of no format."""
    description = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    return description if isinstance(description, dict) else {}


def _short(value: Any) -> str:
    """Put a file's own words into a message: on one line, of bounded length, without control characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(text: str) -> float:
    raise ValueError(f"its description holds {text}")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text[:20])


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError("its description holds a number of more than 20 digits")
    return int(text)

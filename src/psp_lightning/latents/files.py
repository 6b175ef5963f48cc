"""Files of latent codes: our own, which say what they hold, and the plain arrays of other tools.

A file of ours, `.safetensors` or `.npz`, holds codes of one space with their names, the hash of the generator that
they belong to (`generator_hash`), and whether the average latent is included. Its tensor is called as its space. In
safetensors the names are a tensor too, UTF-8 bytes of a JSON list; in `.npz` an array of strings.

Plain arrays, `.npy`, `.pt` or `.npz`, hold numbers alone: (N, 512) or (N, 18, 512) of InterFaceGAN and e4e,
(1, 18, 512) of StyleCLIP and of NVIDIA's projector.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.checkpoints.safetensors_io import KEY, is_safetensors, read_described, save_described
from psp_lightning.checkpoints.torch_files import read_torch
from psp_lightning.latents.codes import Latents, check_space
from psp_lightning.loading import save_atomic
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError

DESCRIBED = (".safetensors", ".npz")
PLAIN = (".npy", ".pt")
KIND = "latents"
INFLATION, SMALL = 100, 1 << 26  # an .npz of that many times its bytes, beyond 64 MB, is no array of anybody's


def save_latents(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write codes with their description; the suffix, `.safetensors` or `.npz`, says how.

    Raises:
        UserError: another suffix; codes of no known generator.
        OSError: the file cannot be written; what was there before stays.
    """
    path = Path(path)
    if path.suffix not in DESCRIBED:
        raise UserError(f"{path}: latents are written as {' or '.join(DESCRIBED)}.")
    if latents.generator is None:
        raise UserError(f"{path} is to name the generator of its latents: give ckpt=...")
    codes = latents.codes.detach().float().cpu().contiguous()
    facts = {
        "space": latents.space,
        "generator": {"sha256": latents.generator, "checkpoint": latents.checkpoint},
        "latent_avg": latents.latent_avg,
    }
    if path.suffix == ".safetensors":
        # names as a tensor: a header has bounded room
        text = torch.from_numpy(np.frombuffer(json.dumps(list(latents.names)).encode(), np.uint8).copy())
        save_described(path, KIND, {latents.space: codes, "names": text}, facts)
        return
    arrays = {latents.space: codes.numpy(), "names": np.array(latents.names), KEY: np.array(json.dumps(facts))}
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def is_plain(path: Path) -> bool:
    """Whether a file holds numbers alone, as far as its suffix tells, and of an `.npz` its entries.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"Latents {path} do not exist.")
    if path.suffix != ".npz":
        return path.suffix != ".safetensors"
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{KEY}.npy" not in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False  # and its reader says what is wrong


def read_latents(path: str | os.PathLike[str]) -> Latents:
    """The codes of a file of `save_latents`.

    Raises:
        UserError: no such file; it is damaged, or a plain array, of which nobody knows the generator.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"Latents {path} do not exist.")
    if path.suffix in (*PLAIN, ".pth"):
        raise UserError(_plain(path))
    facts, codes, names = _parts(path)
    generator = facts.get("generator") if isinstance(facts, dict) else None
    if codes is None or not isinstance(generator, dict) or not isinstance(names, list):
        raise UserError(f"{path} is damaged: codes, names or generator are missing.")
    digest, checkpoint, average = generator.get("sha256"), generator.get("checkpoint"), facts.get("latent_avg")
    known = isinstance(digest, str) and isinstance(checkpoint, str | None)
    if not known or not isinstance(average, bool) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: its description is not what psp-lightning writes.")
    try:
        return Latents(codes, tuple(names), str(facts["space"]), digest, checkpoint, average)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parts(path: Path) -> tuple[Any, Tensor | None, Any]:
    """Description, codes and names of a file, not yet checked."""
    if is_safetensors(path):
        facts, tensors = read_described(path, KIND)
        text = tensors.get("names")
        names = None if text is None or text.dtype != torch.uint8 else _json(path, text.numpy().tobytes())
        return facts, tensors.get(str(facts.get("space"))), names
    arrays = _read_npz(path)
    if KEY not in arrays:
        raise UserError(_plain(path))
    facts = _json(path, str(arrays[KEY]))
    found = arrays.get(str(facts.get("space"))) if isinstance(facts, dict) else None
    codes = None if found is None or found.dtype.kind != "f" else torch.from_numpy(found.astype(np.float32))
    return facts, codes, arrays["names"].tolist() if "names" in arrays else None


def _plain(path: Path) -> str:
    return (
        f"{path} is a plain array that does not name its generator. If its codes belong to the one of ckpt=..., say so "
        f"with: psp-latents in={path} out={path.with_suffix('.safetensors')} ckpt=..."
    )


def _json(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: its description cannot be read.") from None


def gather_latents(path: str | os.PathLike[str], parts: Iterable[Path]) -> int:
    """Write the codes of several files of one space and generator into one; returns how many.

    Raises:
        UserError: a damaged part; parts of different generators. Nothing is written then.
    """
    read = [read_latents(part) for part in parts]
    first = read[0]
    for part in read:
        if part.generator != first.generator:
            raise UserError(
                f"{path} was not written: {part.names[0]} has latents of {part.checkpoint}, {first.names[0]} of "
                f"{first.checkpoint}, whose generators differ. Give another output folder, or overwrite=true."
            )
    names = tuple(name for part in read for name in part.names)
    save_latents(path, replace(first, codes=torch.cat([part.codes for part in read]), names=names))
    return len(names)


# --- plain arrays of other tools


def read_plain(path: str | os.PathLike[str], space: str | None = None) -> Latents:
    """The codes of a plain array, named 00000, 00001, ... by their place.

    Args:
        path: `.npy`, `.npz` with one array, or `.pt` with one tensor.
        space: None: `w_plus` for three dimensions, `w` for two. (n_styles, style_dim) is one code with `w_plus`.

    Raises:
        UserError: no such file; it is damaged, or holds something else. No code from the file runs.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"Latents {path} do not exist.")
    if space is not None:
        check_space(space)
    if path.suffix == ".npz":
        arrays = _read_npz(path)
        if len(arrays) != 1:
            names = ", ".join(list(arrays)[:5])
            raise UserError(f"{path} holds {len(arrays)} arrays ({names}): one is expected in a plain file of codes.")
        codes = _numbers(path, next(iter(arrays.values())))
    elif path.suffix == ".npy":
        codes = _numbers(path, _read_npy(path))
    elif path.suffix in (".pt", ".pth"):
        codes = _read_pt(path)
    else:
        raise UserError(f"{path}: plain codes are read from .npy, .npz or .pt files.")
    codes = codes[None] if codes.ndim == 1 or (codes.ndim == 2 and space == "w_plus") else codes
    space = space or ("w_plus" if codes.ndim == 3 else "w")
    width = max(5, len(str(len(codes))))
    try:
        return Latents(codes, tuple(f"{i:0{width}d}" for i in range(len(codes))), space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_plain(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write the numbers alone, float32: `.npy` as InterFaceGAN reads them, `.pt` as StyleCLIP and e4e do.

    Raises:
        UserError: another suffix; codes without the average latent, which those tools expect.
        OSError: the file cannot be written; what was there before stays.
    """
    path = Path(path)
    if path.suffix not in PLAIN:
        raise UserError(f"{path}: plain codes are written as {' or '.join(PLAIN)}.")
    if not latents.latent_avg and latents.space != "z":
        raise UserError(f"{path}: other tools expect codes with the average latent: give ckpt=... to add it.")
    codes = latents.codes.detach().float().cpu().contiguous()
    if path.suffix == ".pt":
        save_atomic(codes.clone(), path)
        return
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, codes.numpy(), allow_pickle=False)


def _numbers(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f":
        raise UserError(f"{path} holds {array.dtype}, not floating-point codes.")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # a map, so that a huge shape costs no memory
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, OverflowError, MemoryError) as error:
        raise UserError(_unreadable(path, error)) from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > SMALL and claimed > INFLATION * path.stat().st_size:
            raise UserError(f"{path} claims {claimed} bytes in a file of {path.stat().st_size}: it was not unpacked.")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # a damaged archive makes its readers fail in any way whatever
        raise UserError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: BaseException) -> str:
    if "allow_pickle" in str(error):
        return f"{path} holds pickled Python objects, which may run code; it was refused. Save the array alone."
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{path} is no NumPy file, or it is damaged ({reason[:200]})."


def _read_pt(path: Path) -> Tensor:
    content = read_torch(path)
    if isinstance(content, list | tuple) and content and all(isinstance(part, Tensor) for part in content):
        if any(part.shape != content[0].shape for part in content):
            raise UserError(f"{path} holds tensors of several shapes, not one tensor of codes.")
        content = torch.stack(list(content))
    if not isinstance(content, Tensor) or not content.is_floating_point():
        raise UserError(f"{path} holds a {type(content).__name__}, not one floating-point tensor of codes.")
    return content.detach().float().clone()

"""Files of latent codes: our own self-describing files, and the plain arrays of other tools.

Our files are safetensors. They contain codes of one space as a tensor with the name of the space, the codes' names as a
tensor (UTF-8 bytes of a JSON list), the hash of their generator (`generator_hash`), and whether the average latent is
included. Version 0.1.0 could also write `.npz` files, with the names as an array of strings; they can still be read.

Plain arrays (`.npy`, `.pt` or `.npz`) contain only numbers: (N, 512) or (N, 18, 512) from InterFaceGAN and e4e,
(1, 18, 512) from StyleCLIP and NVIDIA's projector.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.checkpoints.safetensors_io import KEY, read_described, save_described
from psp_lightning.checkpoints.torch_files import read_torch
from psp_lightning.latents.codes import SPACES, Latents
from psp_lightning.utils.arguments import choice
from psp_lightning.utils.atomic import replacing, save_torch
from psp_lightning.utils.errors import UserError

OURS = ".safetensors"
DESCRIBED = (OURS, ".npz")  # readable
PLAIN = (".npy", ".pt")
KIND = "latents"
NUMPY = {b"\x93N": ".npy", b"PK": ".npz"}  # suffixes by the first bytes of a file
PICKLED = "contains pickled Python objects, which may run code. Save only the array."
INFLATION, SMALL = 100, 1 << 26  # no real .npz is larger than 64 MB and compressed more than 100 times


def save_latents(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write codes with their description.

    Raises:
        UserError: the suffix is not `.safetensors`, or the codes' generator is unknown.
        OSError: the file cannot be written; an existing file is not changed.
    """
    path = Path(path)
    if path.suffix != OURS:
        raise UserError(f"{path}: latents are written as {OURS}.")
    if latents.generator is None:
        raise UserError(f"{path} must name the generator of its latents: set ckpt=...")
    facts = {
        "space": latents.space,
        "generator": {"sha256": latents.generator, "checkpoint": latents.checkpoint},
        "latent_avg": latents.latent_avg,
        "refined": latents.refined,
    }
    # names are a tensor, because the size of a header is limited
    names = torch.from_numpy(np.frombuffer(json.dumps(list(latents.names)).encode(), np.uint8).copy())
    save_described(path, KIND, {latents.space: latents.codes.float(), "names": names}, facts)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"Latents {path} {'are a folder, not a file' if path.is_dir() else 'do not exist'}.")
    return path


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Return whether a file contains only numbers, according to its suffix or, for `.npz`, its entries.

    Raises:
        UserError: the file does not exist, or is a folder.
    """
    path = _existing(path)
    if path.suffix != ".npz":
        return path.suffix != OURS
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{KEY}.npy" not in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False  # the reader reports the damage


def read_latents(path: str | os.PathLike[str]) -> Latents:
    """Read codes that `save_latents` wrote.

    Raises:
        UserError: the file does not exist, is damaged, or is a plain array, whose generator is unknown.
    """
    path = _existing(path)
    if path.suffix in (*PLAIN, ".pth"):
        raise UserError(_plain(path))
    facts, codes, names = _parts(path)
    generator = facts.get("generator") if isinstance(facts, dict) else None
    if codes is None or not isinstance(generator, dict) or not isinstance(names, list):
        raise UserError(f"{path} is damaged: codes, names or generator are missing.")
    digest, checkpoint, average = generator.get("sha256"), generator.get("checkpoint"), facts.get("latent_avg")
    refined = facts.get("refined", False)
    known = isinstance(digest, str) and isinstance(checkpoint, str | None) and isinstance(refined, bool)
    if not known or not isinstance(average, bool) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: psp-lightning does not write such a description.")
    try:
        return Latents(codes, tuple(names), str(facts["space"]), digest, checkpoint, average, refined)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parts(path: Path) -> tuple[Any, Tensor | None, Any]:
    """Return the description, codes and names of a file, unchecked."""
    if path.suffix != ".npz":
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
        f"{path} is a plain array that does not name its generator. If its codes belong to the generator of ckpt=..., "
        f"run: psp-latents in={path} out={path.with_suffix('.safetensors')} ckpt=..."
    )


def _json(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: its description cannot be read.") from None


def gather_latents(path: str | os.PathLike[str], parts: Iterable[Path]) -> int:
    """Merge files of codes of one space and generator into one file, and return the number of codes.

    Raises:
        UserError: a file is damaged, or the generators differ. Nothing is written.
    """
    read = [read_latents(part) for part in parts]
    first = read[0]
    for part in read:
        if part.generator != first.generator:
            raise UserError(
                f"{path} was not written: {part.names[0]} has latents of {part.checkpoint}, {first.names[0]} of "
                f"{first.checkpoint}, whose generators differ. Choose another output folder, or set overwrite=true."
            )
        if part.refined != first.refined:
            plain, refined = (part, first) if first.refined else (first, part)
            raise UserError(
                f"{path} was not written: {refined.names[0]} has a refinement, {plain.names[0]} has none. Choose "
                "another output folder, or set overwrite=true."
            )
    names = tuple(name for part in read for name in part.names)
    save_latents(path, replace(first, codes=torch.cat([part.codes for part in read]), names=names))
    return len(names)


# --- plain arrays of other tools ------------------------------------------------------------------------------------


def read_plain(path: str | os.PathLike[str], space: str | None = None) -> Latents:
    """Read codes from a plain array, and name them 00000, 00001, ... in order. No code from the file runs.

    Args:
        path: `.npy`, `.npz` with one array, `.pt` with one tensor, or rosinality's projection, without its noise maps.
        space: None: `w_plus` for three dimensions, `w` for two. With `w_plus`, (n_styles, style_dim) is one code.

    Raises:
        UserError: the file does not exist, is damaged or has other content.
    """
    path = _existing(path)
    if space is not None:
        choice("space", space, SPACES)
    readers = {".npz": _read_one_array, ".npy": _read_npy, ".pt": _read_pt, ".pth": _read_pt}
    if path.suffix not in readers:
        raise UserError(f"{path}: plain codes are read from .npy, .npz or .pt files.")
    codes = readers[path.suffix](path)
    codes = codes[None] if codes.ndim == 1 or (codes.ndim == 2 and space == "w_plus") else codes
    space = space or ("w_plus" if codes.ndim == 3 else "w")
    width = max(5, len(str(len(codes))))
    try:
        return Latents(codes, tuple(f"{i:0{width}d}" for i in range(len(codes))), space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_plain(path: str | os.PathLike[str], latents: Latents) -> None:
    """Write only the numbers as float32: `.npy` for InterFaceGAN, `.pt` for StyleCLIP and e4e.

    Raises:
        UserError: the file has another suffix, or the codes do not include the average latent, which those tools
            expect.
        OSError: the file cannot be written; an existing file is not changed.
    """
    path = Path(path)
    if path.suffix not in PLAIN:
        raise UserError(f"{path}: plain codes are written as {' or '.join(PLAIN)}.")
    if not latents.latent_avg and latents.space != "z":
        raise UserError(f"{path}: other tools expect codes with the average latent: set ckpt=... to add it.")
    codes = latents.codes.detach().float().cpu().contiguous()
    if path.suffix == ".pt":
        save_torch(codes.clone(), path)
        return
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, codes.numpy(), allow_pickle=False)


def _numbers(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype.kind != "f":
        raise UserError(f"{path} contains {array.dtype}, not floating-point codes.")
    return torch.from_numpy(np.array(array, dtype=np.float32))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of NumPy's readers into a UserError; for a damaged file, they may raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        objects = "allow_pickle" in str(error) or "Python objects in dtype" in str(error)
        reason = PICKLED if objects else f"is not a NumPy file or is damaged ({first[:200]})."
        raise UserError(f"{path} {reason}") from None


def _check_kind(path: Path) -> None:
    """Raise a UserError for a file of another kind than its suffix says; NumPy takes any such file for a pickle."""
    with path.open("rb") as file:
        head = file.read(2)
    if head.startswith(b"\x80"):
        raise UserError(f"{path} {PICKLED}")
    kind = NUMPY.get(head)
    if kind is None:
        raise UserError(f"{path} is not a NumPy file or is damaged.")
    if kind != path.suffix:
        raise UserError(f"{path} is a {kind} file: rename it to {path.with_suffix(kind).name}.")


def _read_npy(path: Path) -> Tensor:
    with _reading(path):
        _check_kind(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so a huge shape needs no memory
    return _numbers(path, array)


def _read_one_array(path: Path) -> Tensor:
    arrays = _read_npz(path)
    if len(arrays) != 1:
        names = ", ".join(list(arrays)[:5])
        raise UserError(f"{path} contains {len(arrays)} arrays ({names}); a plain file of codes must contain one.")
    return _numbers(path, next(iter(arrays.values())))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with _reading(path):
        _check_kind(path)
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > SMALL and claimed > INFLATION * path.stat().st_size:
            raise UserError(f"{path} claims to unpack {path.stat().st_size} bytes to {claimed}; it was not unpacked.")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _read_pt(path: Path) -> Tensor:
    content = read_torch(path)
    if isinstance(content, dict):  # rosinality's projector: {file: {"latent": ..., "img": ..., "noise": ...}}
        entries = [entry for entry in content.values() if isinstance(entry, dict) and "latent" in entry]
        content = [entry["latent"] for entry in entries] or content
    if isinstance(content, list | tuple) and content and all(isinstance(part, Tensor) for part in content):
        if any(part.shape != content[0].shape for part in content):
            raise UserError(f"{path} contains tensors of several shapes, not one tensor of codes.")
        content = torch.stack(list(content))
    if not isinstance(content, Tensor) or not content.is_floating_point():
        raise UserError(f"{path} contains a {type(content).__name__}, not one floating-point tensor of codes.")
    return content.detach().float().clone()

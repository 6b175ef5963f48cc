"""Looking at a file of weights before it is read: what it is, and whether reading it could fill memory or stack."""

from __future__ import annotations

import argparse
import io
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.loading import first
from psp_lightning.checkpoints.pickles import LEGACY_TORCH, Refused, check_instructions
from psp_lightning.utils.errors import UserError


def check_file(path: Path) -> None:
    """Refuses what `torch.load(weights_only=True)` should not be given, and names the common kinds of wrong files.

    Raises:
        UserError: the file is of another kind, truncated, or would take more memory than its size.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be read: {error.strerror or error}.") from None
    if not head:
        raise UserError(f"Checkpoint {path} is empty. Download or copy it again.")
    other = other_kind(head, path.suffix)
    if other is not None:
        raise UserError(f"{path} {other}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        raise UserError(f"{path} is a safetensors file, but a checkpoint written by torch.save is needed here.")
    try:
        if head.startswith(b"PK"):
            _check_archive(path)
        elif head.startswith(LEGACY_TORCH):
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                check_instructions(data, pickles=5)  # magic number, version, machine, content, keys of the storages
    except Refused as error:
        raise UserError(f"{path} was refused and nothing in it was run: it asks for {error}.") from None
    except (ValueError, IndexError, OverflowError, MemoryError, UnicodeError, struct.error):
        raise UserError(f"Checkpoint {path} is truncated or damaged. Download or copy it again.") from None


def _check_archive(path: Path) -> None:
    """A zip archive of torch.save, nothing in which is larger than its place in the file.

    Raises:
        UserError: another archive; one whose parts would unpack to more than there is.
        Refused: see `check_instructions`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename.rsplit("/", 1)[-1] for entry in entries}
            if "constants.pkl" in names:
                raise UserError(
                    f"{path} is a TorchScript program, not a checkpoint of weights; it was not run. Save the "
                    "state_dict() of the network that it was made from."
                )
            if any(name.endswith(".npy") for name in names):
                raise UserError(f"{path} is a NumPy archive (.npz), not a checkpoint of a network.")
            if "data.pkl" not in names:
                raise UserError(f"{path} is a zip archive, but not a PyTorch checkpoint (it has no data.pkl).")
            # torch.save stores without compression
            size = path.stat().st_size
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in entries) > size:
                what = f"{packed[0][:60]} is compressed" if packed else "its parts claim more bytes than it has"
                raise UserError(f"{path} was refused: {what}, which torch.save never does (a zip bomb, or damaged).")
            for entry in entries:
                if entry.filename.rsplit("/", 1)[-1] == "data.pkl":
                    check_instructions(io.BytesIO(_stored(path, entry)))
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError):
        raise UserError(f"Checkpoint {path} is truncated or damaged. Download or copy it again.") from None


def _stored(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an uncompressed part, whatever its checksum says: torch.save can be told to leave those out."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("a part is not where the directory says")
        name, extra = struct.unpack("<HH", header[26:30])
        file.seek(name + extra, io.SEEK_CUR)
        return file.read(entry.file_size)


def check_sums(path: Path) -> None:
    """Compare the parts of a zip archive of torch.save with their checksums, which torch.load does not.

    Raises:
        UserError: some differ. Where all do, the file was written without checksums, and nothing can be said.
    """
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    wrong = [entry.filename for entry in entries if zlib.crc32(_stored(path, entry)) != entry.CRC]
    if 0 < len(wrong) < len(entries):
        raise UserError(
            f"{path} is damaged: {len(wrong)} of its {len(entries)} parts do not have their checksum, the first is "
            f"{wrong[0][:60]}. Download or copy it again."
        )


def other_kind(head: bytes, suffix: str = "") -> str | None:
    """What a file is that no reader of weights takes, and what can be done, from its first bytes; None: unknown."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "is an HTML page, not a checkpoint: the download gave a web page (a login, a quota or a confirmation "
            "page). Download it again, for example with `psp-weights get`, gdown or in a browser."
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`."
    if head.startswith(b"\x80") and not head.startswith(LEGACY_TORCH):
        return (
            "is a pickle, not a checkpoint written by torch.save; nothing in it was run. A network-*.pkl of NVIDIA's "
            "StyleGAN2 becomes a file for this library with `psp-weights import FILE out=generator.safetensors`."
        )
    if suffix.lower() == ".onnx" or b"onnx" in head[:64] or b"pytorch" in head[2:32]:
        return "is an ONNX model, a compiled graph: take the file of weights that it was made from."
    for magic, what in (
        (b"\x89HDF", "an HDF5 file (Keras or TensorFlow)"),
        (b"\x1f\x8b", "a gzip archive: unpack it first"),
        (b"BZh", "a bzip2 archive: unpack it first"),
        (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
        (b"Rar!", "a RAR archive: unpack it first"),
        (b"GGUF", "a GGUF file (a language model)"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"\x89PNG", "a PNG image"),
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"%PDF", "a PDF document"),
        (b"TFL3", "a TensorFlow Lite model"),
    ):
        if head.startswith(magic) or (magic == b"TFL3" and head[4:8] == magic):
            return f"is {what}, not a PyTorch checkpoint."
    if head[257:262] == b"ustar":
        return "is a tar archive, not a PyTorch checkpoint: unpack it first."
    return None


def check_tensors(content: Any, path: Path) -> None:
    """Every tensor is an ordinary one whose numbers are in the file.

    A view can stretch one stored number to any shape; building a network of that shape would fill the memory.

    Raises:
        UserError: a tensor of another kind, or of more memory than the file has.
    """
    size = path.stat().st_size
    pending, seen, total = [content], set(), 0
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        elif isinstance(value, argparse.Namespace):
            pending.append(vars(value))
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
                raise UserError(f"{path} holds a tensor of an unusual kind ({value.layout}, {value.device}).")
            count = value.numel() * value.element_size()
            total += count
            if count > value.untyped_storage().nbytes() or total > 4 * size + (1 << 20):
                shape = tuple(value.shape)
                raise UserError(
                    f"{path} was refused: a tensor of shape {shape} asks for more memory than the file has."
                )


def explain(content: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """What a checkpoint without a known network is, and what can be done."""
    keys = list(state)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, str(key)) for key in keys[:20_000])

    if some(r"(^|\.)progression\.\d") or "g_running" in content:
        return (
            "this is a StyleGAN1 (rosinality/style-based-gan-pytorch), whose generator is another one. Take a "
            "StyleGAN2 of the same data."
        )
    if some(r"^GAN\.|^G\.initial_block|^S\.net\."):
        return "this is a checkpoint of lucidrains/stylegan2-pytorch, whose generator differs from the published one."
    if some(r"style_mapping\.|to_rgb_layers|mapping\.dense\d|synthesis\.layer\d"):
        return (
            "this is a generator of another toolbox (GenForce, MMGeneration) with layers of its own names. Import the "
            "file that it was converted from."
        )
    if some(r"down_blocks|model\.diffusion_model|\bunet\b|cond_stage_model"):
        return "this is a diffusion model (diffusers or latent diffusion), not a StyleGAN2."
    if some(r"^input_layer\.0\.weight$") and some(r"^output_layer"):
        return (
            "this is a face recognition network (IR-SE50 or IR-101), no generator: put it into the weights folder, see "
            "psp-weights list."
        )
    if "pytorch-lightning_version" in content:
        parts = first(dict.fromkeys(str(key).split(".")[0] for key in keys)) or "none"
        return (
            f"this is a PyTorch Lightning checkpoint of another project; its network has the parts {parts}. None of "
            "them is a StyleGAN2 generator in the published layout (style.*, conv1.*, convs.*, to_rgbs.*). Where one "
            "is under other names, rename it: torch.save({'g_ema': state_dict}, FILE)."
        )
    if some(r"^convs\.\d+\.(conv\d?\.)?\d") and some(r"^final_"):
        return "this is a discriminator alone; the generator is in another file or under another key."
    shown = first(str(key)[:60] for key in keys) or "none"
    return (
        "this holds no StyleGAN2 generator in the published layout or NVIDIA's, and no pSp network; its keys are: "
        f"{shown}."
    )

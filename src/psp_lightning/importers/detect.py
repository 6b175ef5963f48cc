"""Looking at a file of weights before it is read: what it is instead, and what can be done."""

from __future__ import annotations

import mmap
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psp_lightning.checkpoints.strict import first
from psp_lightning.checkpoints.torch_files import LEGACY_TORCH, stored_part
from psp_lightning.utils.errors import UserError, clean


def check_file(path: Path) -> None:
    """Names the common kinds of files that are no checkpoint of torch.save.

    Raises:
        UserError: the file is of another kind, empty, or an archive whose parts would unpack to more than there is.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be read: {error.strerror or error}.") from None
    if not head:
        raise UserError(f"Checkpoint {path} is empty. Download or copy it again.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        raise UserError(f"{path} is a safetensors file, but a checkpoint written by torch.save is needed here.")
    other = other_kind(head, path.suffix)
    if other is not None:
        raise UserError(f"{path} {other}")
    if head.startswith(b"PK"):
        _check_archive(path)


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # a damaged archive makes its reader fail in many ways
        raise UserError(f"Checkpoint {path} is truncated or damaged. Download or copy it again.") from None
    names = [entry.filename.rsplit("/", 1)[-1] for entry in entries]
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript program, not a checkpoint of weights; it was not run. Save the state_dict() of "
            "the network that it was made from."
        )
    if any(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a NumPy archive (.npz), not a checkpoint of a network.")
    if "data.pkl" not in names:
        raise UserError(f"{path} is a zip archive, but not a PyTorch checkpoint (it has no data.pkl).")
    odd = ""
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        odd = f"{clean(packed[0], 60)} is compressed"
    elif sum(entry.file_size for entry in entries) > path.stat().st_size:
        odd = "its parts claim more bytes than it has"
    elif len({entry.filename for entry in entries}) < len(entries) or names.count("data.pkl") > 1:
        odd = "several of its parts have the same name"
    if odd:
        raise UserError(f"{path} was refused: {odd}, which torch.save never does (a zip bomb, or damaged).")


def check_sums(path: Path) -> None:
    """Compare the parts of a zip archive of torch.save with their checksums, which reading it does not.

    Raises:
        UserError: some differ. Where all do, the file was written without checksums, and nothing can be said.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.file_size]
        wrong = [entry.filename for entry in entries if zlib.crc32(stored_part(data, entry)) != entry.CRC]
    if 0 < len(wrong) < len(entries):
        raise UserError(
            f"{path} is damaged: {len(wrong)} of its {len(entries)} parts do not have their checksum, the first is "
            f"{clean(wrong[0], 60)}. Download or copy it again."
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
    shown = first(map(str, keys)) or "none"
    return (
        "this holds no StyleGAN2 generator in the published layout or NVIDIA's, and no pSp network; its keys are: "
        f"{shown}."
    )

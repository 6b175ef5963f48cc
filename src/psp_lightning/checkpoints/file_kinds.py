"""Tell what a file is instead of weights, from its first bytes or from what its pickle asks for."""

from __future__ import annotations

import os
from pathlib import Path

from psp_lightning.utils.errors import UserError

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before zip archives
MAX_HEADER = 1 << 27  # bytes of a safetensors header

# Each sentence continues "PATH is".
NOT_TORCH = {
    "safetensors": "a safetensors file, but a checkpoint written by torch.save is needed here.",
    "pickle": "a pickle, not a checkpoint written by torch.save; nothing in it was run. A network-*.pkl of NVIDIA's "
    "StyleGAN2 becomes a file for this library with `psp-weights import FILE out=generator.safetensors`.",
}
BY_SUFFIX = {
    ".npz": "a NumPy archive (.npz), not a checkpoint of a network.",
    ".onnx": "an ONNX model, a compiled graph: take the file of weights that it was made from.",
}
BY_FIRST_BYTES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`.",
    b"\x1f\x8b": "a gzip archive: unpack it first.",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow), not a PyTorch checkpoint.",
}
WEB_PAGE = (
    "an HTML page, not a checkpoint: the download gave a web page (a login, a quota or a confirmation page). Download "
    "it again, for example with `psp-weights get`, gdown or in a browser."
)


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return `"safetensors"`, `"zip"`, `"legacy torch"`, `"pickle"` or `"unknown"`.

    Raises:
        UserError: the file cannot be opened, is empty, or is of a known kind without weights; says what to do.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be read: {error.strerror or error}.") from None
    if not head:
        raise UserError(f"Checkpoint {path} is empty. Download or copy it again.")
    if other := _other_kind(head, Path(path).suffix.lower()):
        raise UserError(f"{path} is {other}")
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(LEGACY_TORCH):
        return "legacy torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < MAX_HEADER:
        return "safetensors"  # before pickles: the header's length may begin with a pickle's first byte
    return "pickle" if head.startswith(b"\x80") else "unknown"


def _other_kind(head: bytes, suffix: str) -> str:
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return WEB_PAGE
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first."
    return next((what for first, what in BY_FIRST_BYTES.items() if head.startswith(first)), "")


def explain_request(asks_for: str) -> str:
    """Say what a file is whose pickle asks for something that it does not get.

    Args:
        asks_for: the name of a class or function, or a description.
    """
    if asks_for.startswith(("dnnlib.tflib", "tfutil.", "network.")):
        return (
            f"it is a TensorFlow pickle, as of StyleGAN or StyleGAN2 ({asks_for}). Convert it in its own environment, "
            "a StyleGAN2 with legacy.py of NVlabs/stylegan2-ada-pytorch (--source, --dest) or convert_weight.py of "
            "rosinality/stylegan2-pytorch, and import what that writes. StyleGAN1 has another generator and cannot be "
            "used."
        )
    if asks_for.startswith("__torch__."):
        return (
            f"it is a TorchScript program ({asks_for}), not a checkpoint of weights. Save the state_dict() of the "
            "network that it was made from."
        )
    if asks_for.startswith(("torch.nn.", "torch.jit", "torch_utils.", "models.", "model.", "training.")):
        return (
            f"it holds whole Python objects ({asks_for}), not weights. Load it where it was made and save its "
            "state_dict() with torch.save."
        )
    if " " in asks_for:
        return f"it asks for {asks_for}."
    return f"it asks for {asks_for}, which is neither a plain value, a tensor nor a network of NVIDIA's StyleGAN2."

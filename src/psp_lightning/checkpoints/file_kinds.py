"""Recognise the kind of a file from its first bytes, or from the names in its pickle."""

from __future__ import annotations

import os
from pathlib import Path

from psp_lightning.utils.errors import UserError
from psp_lightning.utils.web_page import is_web_page

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before it wrote zip archives
MAX_HEADER = 1 << 27  # bytes of a safetensors header

# Each text continues "PATH is".
NOT_TORCH = {
    "safetensors": "a safetensors file, but a checkpoint written by torch.save is needed here.",
    "pickle": "a pickle, not a checkpoint written by torch.save; nothing in it was run. Convert a network-*.pkl of "
    "NVIDIA's StyleGAN2 with `psp-weights import FILE out=generator.safetensors`.",
}
BY_SUFFIX = {
    ".npz": "a NumPy archive (.npz), not a checkpoint of a network.",
    ".onnx": "an ONNX model, which is a compiled graph: use the weights that it was made from.",
}
BY_FIRST_BYTES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`.",
    b"\x1f\x8b": "a gzip archive: unpack it first.",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow), not a PyTorch checkpoint.",
}
WEB_PAGE = (
    "an HTML page, not a checkpoint: the download returned a web page (a login, a quota or a confirmation page). "
    "Download it again, for example with `psp-weights get`, gdown or a browser."
)


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return `"safetensors"`, `"zip"`, `"legacy torch"`, `"pickle"` or `"unknown"`.

    Raises:
        UserError: the file cannot be opened, is empty, or is of a known kind without usable weights; the message says
            what to do.
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
        return "safetensors"  # before pickles, because a header's length may begin with the first byte of a pickle
    return "pickle" if head.startswith(b"\x80") else "unknown"


def _other_kind(head: bytes, suffix: str) -> str:
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    if is_web_page(head):
        return WEB_PAGE
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first."
    return next((what for first, what in BY_FIRST_BYTES.items() if head.startswith(first)), "")


def explain_request(asks_for: str) -> str:
    """Explain what kind of file a pickle is that asks for `asks_for`: a class, a function, or a description."""
    if asks_for.startswith(("dnnlib.tflib", "tfutil.", "network.")):
        return (
            f"it is a TensorFlow pickle of StyleGAN or StyleGAN2 ({asks_for}). Convert a StyleGAN2 in its own "
            "environment with legacy.py of NVlabs/stylegan2-ada-pytorch (--source, --dest) or convert_weight.py of "
            "rosinality/stylegan2-pytorch, then import the result. StyleGAN1 has a different generator and cannot be "
            "used."
        )
    if asks_for.startswith("__torch__."):
        return (
            f"it is a TorchScript program ({asks_for}), not a checkpoint of weights. Save the state_dict() of the "
            "original network."
        )
    if asks_for.startswith(("torch.nn.", "torch.jit", "torch_utils.", "models.", "model.", "training.")):
        return (
            f"it contains whole Python objects ({asks_for}), not weights. Load it in its own environment and save its "
            "state_dict() with torch.save."
        )
    if " " in asks_for:
        return f"it asks for {asks_for}."
    return f"it asks for {asks_for}, which is neither a plain value, a tensor nor a network of NVIDIA's StyleGAN2."

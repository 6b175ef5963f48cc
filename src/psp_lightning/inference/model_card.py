"""The model card beside an exported network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

import psp_lightning
from psp_lightning.checkpoints.safetensors_io import KEY, is_safetensors
from psp_lightning.checkpoints.strict import resolve
from psp_lightning.latents.codes import generator_hash
from psp_lightning.utils.errors import clean
from psp_lightning.zoo import locate as pretrained

if TYPE_CHECKING:
    from psp_lightning.inference.export import Part

OPSET = 17
TITLES = {
    "encoder": "the encoder of a pSp network (arXiv:2008.00951): a source image to a StyleGAN2 code",
    "generator": "the synthesis network of a StyleGAN2 generator (arXiv:1912.04958): a code to an image",
    "both": "a pSp network (arXiv:2008.00951): a source image to an image",
}
SOURCES = {
    "rgb": "RGB in [-1, 1]",
    "sketch": "grey in [0, 1], paper 1, ink 0",
    "labels": "one-hot label map, one channel a class, 0 or 1",
    "lowres": "RGB in [-1, 1], of low resolution, resized bilinearly",
    "masked": "RGB in [-1, 1] with 0 in the hole, then the hole: 1 inside, 0 outside",
}
LABELS = {
    "onnx": f"ONNX, opset {OPSET}",
    "torchscript": "TorchScript, traced",
    "safetensors": "Weights of psp-lightning",
}
CALLS = {
    "onnx": """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
{input} = np.zeros({shape}, np.float32)
({output},) = session.run(None, {{"{input}": {input}}})""",
    "torchscript": """import torch

network = torch.jit.load("{file}", map_location="cpu")
{input} = torch.zeros({shape})
with torch.no_grad():
    {output} = network({input})""",
    "safetensors": """import torch
{load}
{input} = torch.zeros({shape})
with torch.no_grad():
    {output} = {call}""",
}


def facts_of(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint that could be loaded tells of itself: `checkpoint`, `sha256` of its file, `origin`."""
    path = Path(checkpoint).expanduser() / "generator.safetensors"
    path = path if path.is_file() else resolve(checkpoint)
    facts: dict[str, Any] = {"checkpoint": os.fspath(checkpoint), "sha256": pretrained.sha256(path), "origin": {}}
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            origin = json.loads((file.metadata() or {}).get(KEY, "{}")).get("origin")
        facts["origin"] = origin if isinstance(origin, dict) else {}
    return facts


def model_card(part: Part, path: Path, format: str, checked: str, facts: Mapping[str, Any]) -> str:
    """Markdown: what the file is, its input and output, where it comes from, how it is called.

    Args:
        part: what was exported.
        path: the file.
        format: key of `CALLS`.
        checked: how it was compared, a clause.
        facts: as of `facts_of`, where they are known.
    """
    net: Any = part.whole[0]
    generator = net.generator
    code = f"float32 (batch, {net.n_styles}, {net.style_dim})", "w_plus, the average latent included"
    image = (
        f"float32 (batch, {generator.config.get('image_channels', 3)}, {generator.output_size}, "
        f"{generator.output_size})"
    )
    shape: tuple[int, ...]
    if part.what == "generator":
        shape, given = (1, net.n_styles, net.style_dim), code
    else:
        channels, side = net.encoder.in_channels, net.encoder.input_size
        values = SOURCES.get(str(net.source.get("kind")), "as in its training; the checkpoint does not say")
        shape, given = (1, channels, side, side), (f"float32 (batch, {channels}, {side}, {side})", values)
    result = code if part.what == "encoder" else (image, "about [-1, 1], not clamped")
    lines = [
        f"# {path.name}",
        "",
        f"{LABELS[format]}: {TITLES[part.what]}. Written by psp-lightning {psp_lightning.__version__}.",
        "",
        "| | name | type and shape | values |",
        "|---|---|---|---|",
        f"| input | `{part.input}` | {given[0]} | {given[1]} |",
        f"| output | `{part.output}` | {result[0]} | {result[1]} |",
        "",
        "The batch is free, other sizes are fixed."
        + ("" if part.what == "encoder" else " Noise is the stored maps: equal inputs give equal images."),
        "",
        f"- made from: {_checkpoint(facts)}",
    ]
    if part.what != "generator":
        more = f", {net.passes} passes, each over an image of the generator, which the file holds" if net.passes else ""
        lines.append(f"- encoder: {type(net.encoder).__name__}, {_millions(net.encoder)} parameters{more}")
    lines += [
        f"- generator: {type(generator).__name__}, {generator.output_size} px, {net.n_styles} styles of "
        f"{net.style_dim}, {_millions(generator)} parameters, hash `{generator_hash(generator)[:16]}`",
        f"- checked: {checked}",
        *_origin(facts),
        "",
        "```python",
        CALLS[format].format(file=path.name, input=part.input, output=part.output, shape=shape, **_ours(part, path)),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _checkpoint(facts: Mapping[str, Any]) -> str:
    name = f"`{facts['checkpoint']}`" if facts.get("checkpoint") else "a network in memory"
    return f"{name}, SHA-256 `{facts['sha256']}`" if facts.get("sha256") else name


def _origin(facts: Mapping[str, Any]) -> list[str]:
    origin = {str(key): value for key, value in dict(facts.get("origin") or {}).items()}
    licence = origin.pop("licence", None)
    told = [f"- {_line(key.replace('_', ' '))}: {_line(value)}" for key, value in sorted(origin.items())]
    unknown = "the checkpoint does not say; ask whoever made it, and mind the training images', before you pass it on"
    return [f"- licence: {_line(licence) if licence else unknown}", *told]


def _line(value: Any) -> str:
    """A file's own words: on one line, of bounded length."""
    return clean(" ".join(str(value).split()), 300)


def _ours(part: Part, path: Path) -> dict[str, str]:
    if part.what == "generator":
        load = "from psp_lightning.loading import load_generator\n\n"
        return {
            "load": f'{load}generator, latent_avg = load_generator("{path.name}")',
            "call": "generator.synthesis(w_plus)",
        }
    load = "from psp_lightning import PSP\n\n"
    return {"load": f'{load}net = PSP.from_checkpoint("{path.name}")', "call": "net(source)"}


def _millions(network: torch.nn.Module) -> str:
    n = sum(parameter.numel() for parameter in network.parameters())
    return f"{n / 1e6:.1f} million" if n >= 1e5 else str(n)

"""Model cards of exported networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import psp_lightning
from psp_lightning.checkpoints.file_kinds import file_kind
from psp_lightning.checkpoints.read import resolve
from psp_lightning.checkpoints.safetensors_io import read_description
from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import clean
from psp_lightning.zoo import locate

OPSET = 17
TITLES = {
    "encoder": "the encoder of a pSp network (arXiv:2008.00951): a source image to a StyleGAN2 code",
    "generator": "the synthesis network of a StyleGAN2 generator (arXiv:1912.04958): a code to an image",
    "both": "a pSp network (arXiv:2008.00951): a source image to an image",
}
PORTS = {"encoder": ("source", "w_plus"), "generator": ("w_plus", "image"), "both": ("source", "image")}
SOURCES = {
    "rgb": "RGB in [-1, 1]",
    "sketch": "grey in [0, 1], paper 1, ink 0",
    "labels": "one-hot label map, one channel per class, 0 or 1",
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
from psp_lightning import PSP

net = PSP.from_checkpoint("{file}")
{input} = torch.zeros({shape})
with torch.no_grad():
    {output} = net(source)""",
    "safetensors generator": """import torch
from psp_lightning.loading import load_generator

generator, latent_avg = load_generator("{file}")
{input} = torch.zeros({shape})
with torch.no_grad():
    {output} = generator.synthesis(w_plus)""",
}


def facts_of(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return `checkpoint`, the `sha256` of its file and the `origin` that it records; the checkpoint must load."""
    path = resolve(checkpoint, generator=True)
    origin = read_description(path).get("origin") if file_kind(path) == "safetensors" else None
    return {
        "checkpoint": os.fspath(checkpoint),
        "sha256": locate.sha256(path),
        "origin": origin if isinstance(origin, dict) else {},
    }


def model_card(net: PSP, what: str, path: Path, format: str, checked: str, facts: Mapping[str, Any]) -> str:
    """Return Markdown that describes an exported file: content, input, output, origin and a call.

    `what` is a key of `TITLES` and `format` one of `LABELS`. `checked` is a clause about the comparison with PyTorch.
    `facts` is the result of `facts_of`, or a part of it.
    """
    generator: Any = net.generator
    encoder: Any = net.encoder
    input, output = PORTS[what]
    code = f"float32 (batch, {net.n_styles}, {net.style_dim})", "w_plus, the average latent included"
    sides = f"{generator.config.get('image_channels', 3)}, {generator.output_size}, {generator.output_size}"
    image = f"float32 (batch, {sides})", "about [-1, 1], not clamped"
    shape: tuple[int, ...] = (1, net.n_styles, net.style_dim)
    given = code
    if what != "generator":
        values = SOURCES.get(str(net.source.get("kind")), "as in its training; the checkpoint does not describe them")
        shape = (1, encoder.in_channels, encoder.input_size, encoder.input_size)
        given = f"float32 (batch, {', '.join(map(str, shape[1:]))})", values
    result = code if what == "encoder" else image
    lines = [
        f"# {path.name}",
        "",
        f"{LABELS[format]}: {TITLES[what]}. Written by psp-lightning {psp_lightning.__version__}.",
        "",
        "| | name | type and shape | values |",
        "|---|---|---|---|",
        f"| input | `{input}` | {given[0]} | {given[1]} |",
        f"| output | `{output}` | {result[0]} | {result[1]} |",
        "",
        "The batch size is free; other sizes are fixed."
        + ("" if what == "encoder" else " The noise is constant, so equal inputs give equal images."),
        "",
        f"- made from: {_checkpoint(facts)}",
    ]
    if what != "generator":
        more = f", {net.passes} passes over images of the generator, which the file includes" if net.passes else ""
        lines.append(f"- encoder: {type(encoder).__name__}, {_millions(encoder)} parameters{more}")
    if what == "both" and (refiner := net.refiner) is not None:
        lines.append(
            f"- refiner: {type(refiner).__name__}, {_millions(refiner)} parameters, changes the feature map of side "
            f"{refiner.resolution}"
        )
    call = CALLS["safetensors generator" if (format, what) == ("safetensors", "generator") else format]
    lines += [
        f"- generator: {type(generator).__name__}, {generator.output_size} px, {net.n_styles} styles of "
        f"{net.style_dim}, {_millions(generator)} parameters, hash `{generator_hash(generator)[:16]}`",
        f"- checked: {checked}",
        *_origin(facts),
        "",
        "```python",
        call.format(file=path.name, input=input, output=output, shape=shape),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _checkpoint(facts: Mapping[str, Any]) -> str:
    name = f"`{facts['checkpoint']}`" if facts.get("checkpoint") else "a network in memory"
    return f"{name}, SHA-256 `{facts['sha256']}`" if facts.get("sha256") else name


def _origin(facts: Mapping[str, Any]) -> list[str]:
    origin = {str(key): value for key, value in dict(facts.get("origin") or {}).items()}
    licence = origin.pop("licence", None)
    lines = [f"- {_line(key.replace('_', ' '))}: {_line(value)}" for key, value in sorted(origin.items())]
    unknown = "not in the checkpoint; ask its author, and check the training images' licence, before you pass it on"
    return [f"- licence: {_line(licence) if licence else unknown}", *lines]


def _line(value: Any) -> str:
    """Return text from a file as one line of limited length."""
    return clean(" ".join(str(value).split()), 300)


def _millions(network: nn.Module) -> str:
    n = sum(parameter.numel() for parameter in network.parameters())
    return f"{n / 1e6:.1f} million" if n >= 1e5 else str(n)

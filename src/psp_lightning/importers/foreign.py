"""Importing: any file of weights that people have, to networks of ours that can be saved as self-describing files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from psp_lightning import loading as io
from psp_lightning.checkpoints.file_kinds import file_kind
from psp_lightning.checkpoints.safetensors_io import KEY, check_header, read_described
from psp_lightning.checkpoints.strict import build_and_load, compare, understanding
from psp_lightning.checkpoints.weight_files import COMPUTED, read_generator, read_psp, save_generator, save_psp
from psp_lightning.importers import published as convert
from psp_lightning.importers.detect import explain
from psp_lightning.importers.nvidia import (
    NvidiaGenerator,
    convert_nvidia,
    convert_nvidia_state,
    is_nvidia_state,
    read_nvidia,
)  # fmt: skip
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator, StyledConv, ToRGB
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate as pretrained

WHAT = ("all", "generator")
AVERAGES = ("stored", "computed")
NOISE_SEED = 0
CLAMP_IMAGES = 2
MANY = 20


@dataclass
class Imported:
    """What a file gave.

    Attributes:
        source: what the file is, in a few words.
        net: the generator or the pSp network, in eval mode.
        latent_avg: (style_dim,) or (n_styles, style_dim), of a generator; None: to be computed.
        average: where the average latent comes from.
        rows: part, number of tensors, what became of them.
        notes: what a user should know, one sentence each.
        facts: plain values for the description's `origin`.
    """

    source: str
    net: Generator | PSP
    latent_avg: Tensor | None = None
    average: str = COMPUTED
    rows: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`psp` or `generator`, the kind of the file that `save` writes."""
        return "psp" if isinstance(self.net, PSP) else "generator"

    @property
    def generator(self) -> Generator:
        """The generator, alone or in its network."""
        return self.net.generator if isinstance(self.net, PSP) else self.net  # type: ignore[return-value]

    def save(self, path: str | os.PathLike[str], origin: Mapping[str, Any] | None = None) -> None:
        """Write the self-describing file; `origin` adds to its facts.

        Raises:
            OSError: it cannot be written.
        """
        origin = {**self.facts, **(origin or {})}
        if isinstance(self.net, PSP):
            save_psp(path, self.net, origin)
        else:
            given = None if self.latent_avg is None else (self.latent_avg, self.average)
            save_generator(path, self.net, origin, latent_avg=given)

    def summary(self) -> list[tuple[str, str]]:
        """Pairs of a name and a line: what the network is."""
        config = self.generator.config
        table = channel_table(self.generator)
        lines = [
            ("file", self.source),
            (
                "generator",
                f"{config['output_size']} px, {config['image_channels']} image channels, mapping of "
                f"{config['n_mapping']} layers, z {config['z_dim']}, w {config['style_dim']}, "
                f"{self.generator.n_styles} styles",
            ),
            ("channels", ", ".join(f"{r}: {n}" for r, n in table.items()) + f" ({_rule(config)})"),
            ("latent_avg", self.average),
        ]
        if isinstance(self.net, PSP):
            encoder: Any = self.net.encoder
            passes = f", {self.net.passes} passes" if self.net.passes else ""
            text = f"{type(encoder).__name__}, {encoder.in_channels} channels of {encoder.input_size} px{passes}"
            lines.insert(1, ("encoder", text))
            lines.append(("source", ", ".join(f"{k}: {v}" for k, v in self.net.source.items() if v) or "not said"))
        if self.facts.get("activation_clamp") is not None:
            lines.append(("clamp", f"activations at +-{self.facts['activation_clamp']}"))
        return lines


def channel_table(generator: Generator) -> dict[int, int]:
    """Channels by resolution."""
    widths = {4: generator.input["input"].shape[1]}
    for i, to_rgb in enumerate(generator.to_rgbs):
        widths[8 << i] = to_rgb.conv.weight.shape[1]  # type: ignore[union-attr,index,assignment]
    return widths


def _rule(config: Mapping[str, Any]) -> str:
    if "channels" in config:
        return "no rule, listed"
    base = config["channel_base"] * config["channel_multiplier"]
    name = {32768: "config-f, multiplier 2", 16384: "config-e or auto, multiplier 1"}.get(base, f"base {base}")
    return f"{name}, at most {config['max_channels']}"


def import_file(
    path: str | os.PathLike[str],
    label: int | None = None,
    what: str = "all",
    average: str = "stored",
    in_channels: int | None = None,
) -> Imported:
    """Reads a file of weights; nothing in it is run.

    Args:
        path: a rosinality `.pt`, an NVIDIA StyleGAN2 `.pkl`, a released pSp, e4e or ReStyle `.pt`, a state dict in one
            of these layouts, a file or run folder of ours, or the name of shipped weights.
        label: class of a conditional NVIDIA generator.
        what: `all`; or `generator` to leave an encoder out.
        average: `stored`, or `computed` to compute the average latent of a generator anew.
        in_channels: of a released encoder, where it shall not be what the file has.

    Raises:
        UserError: what the file is instead, and what can be done.
    """
    trained = Path(path).expanduser() / "generator.safetensors"
    file = trained if trained.is_file() else io.resolve(path)
    result = _read(file, label, what, in_channels)
    if what == "generator" and isinstance(result.net, PSP):
        rows = [row for row in result.rows if not row[0].startswith("encoder")]
        count = len(result.net.encoder.state_dict())
        net: Generator = result.net.generator  # type: ignore[assignment]
        rows.append(("encoder", count, "not used: what=generator"))
        result = Imported(result.source, net, result.net.latent_avg, "the file's", rows, result.notes, result.facts)
    if not isinstance(result.net, PSP):
        if in_channels is not None:
            raise UserError(f"in_channels={in_channels} is for encoders, and {file} gives a generator alone.")
        if average == "computed":
            result.latent_avg, result.average = None, COMPUTED
        elif result.latent_avg is not None:
            result.latent_avg = _short_average(file, result.latent_avg, result.net)
        else:
            result.average = f"{COMPUTED} (the file has none)"
    _check_finite(file, result.net)
    result.net.eval()
    result.facts = {
        "file": file.name, "sha256": pretrained.sha256(file), "layout": result.source, "made_by": "psp-weights import",
        **result.facts,
    }  # fmt: skip
    return result


def _read(file: Path, label: int | None, what: str, in_channels: int | None) -> Imported:
    kind = file_kind(file)
    if kind == "safetensors":
        content = _safetensors(file)
        if content is None:
            _no_label(label, file)
            return _own_file(file)
    elif kind == "pickle":
        content = read_nvidia(file)
        with understanding(file):
            return _nvidia(convert_nvidia(content, label), "NVIDIA StyleGAN2 pickle")
    else:
        content = io.read(file)
    with understanding(file):
        flat = io.tensors_of(content)
        if is_nvidia_state(flat):
            return _nvidia(convert_nvidia_state(flat, label), "state dict in NVIDIA's layout")
    _no_label(label, file)
    if "psp" in content:
        net = io.load_psp(file)
        return Imported("checkpoint of psp-train", net, average="the file's", rows=_rows(net, net.state_dict()))
    with understanding(file):
        return _published(content, what, in_channels)


def _no_label(label: int | None, file: Path) -> None:
    if label is not None:
        raise UserError(f"label={label} is for NVIDIA's conditional networks; {file} takes no labels.")


def _own_file(file: Path) -> Imported:
    """A self-describing file, read again: what it says stays said."""
    description, tensors = read_described(file)
    kind = description.get("kind")
    if kind == "psp":
        net: Generator | PSP = read_psp(file)
        result = Imported("pSp network of this library", net, average="the file's")
    elif kind == "generator":
        net, average = read_generator(file)
        made = str(description.get("latent_avg", "the file's"))
        result = Imported("generator of this library", net, average, made)
        tensors.pop("latent_avg", None)
    else:
        raise UserError(f"{file} is of kind {str(kind)[:40]!r}: only generators and pSp networks are imported.")
    result.rows = _rows(result.net, tensors)
    origin = description.get("origin")
    result.facts = dict(origin) if isinstance(origin, Mapping) else {}
    return result


def _safetensors(file: Path) -> dict[str, Any] | None:
    """The tensors of a safetensors file of someone else; None for one of ours."""
    try:
        check_header(file)
        with safe_open(file, framework="pt", device="cpu") as stream:
            if KEY in (stream.metadata() or {}):
                return None
            return {name: stream.get_tensor(name).clone() for name in stream.keys()}
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is damaged or no safetensors file ({reason[:200]}).") from None


def _nvidia(found: NvidiaGenerator, source: str) -> Imported:
    net = build_and_load(lambda: Generator(**convert.infer_generator(found.state)), found.state, "the generator")
    rows = _rows(net, found.state)
    rows = [(part, n, f"adapted: {found.adapted[part]}" if part in found.adapted else text) for part, n, text in rows]
    result = Imported(
        f"{source}, {found.facts['network']}", net, found.latent_avg, "the file's w_avg", rows, found.notes, found.facts
    )
    clamp = found.facts.get("activation_clamp")
    if clamp is not None:
        largest = largest_activation(net)
        acts = "images can differ a little" if largest > clamp else "so it does not act"
        result.notes.append(
            f"its layers clamp activations at {clamp}, for float16; here they are not clamped in float32. The largest "
            f"of {CLAMP_IMAGES} images is {largest:.4g}: {acts}."
        )
    return result


@torch.no_grad()
def largest_activation(generator: Generator) -> float:
    """The largest absolute value that leaves a layer for a few latents of a fixed seed."""
    largest = 0.0

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    handles = [m.register_forward_hook(hook) for m in generator.modules() if isinstance(m, (StyledConv, ToRGB))]
    try:
        z = torch.randn(CLAMP_IMAGES, generator.z_dim, generator=torch.Generator().manual_seed(0))
        for row in z.split(1):
            generator(row)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _published(content: Mapping[str, Any], what: str, in_channels: int | None) -> Imported:
    """Files in the published PyTorch layout: rosinality's, pSp's, e4e's, ReStyle's, others with such tensors."""
    state = io.tensors_of(content)
    encoder, decoder = convert.select(state, "encoder."), convert.select(state, "decoder.")
    if encoder and convert.is_generator_state(decoder):
        opts = io._options(content)
        name, reason = convert.project(encoder, opts), convert.why_not_built(encoder, opts)
        if reason is None and what == "all":
            net = io.released(content, in_channels)
            given = {f"encoder.{k}": v for k, v in encoder.items()} | {f"generator.{k}": v for k, v in decoder.items()}
            rows = _rows(net, given, ["latent_avg", "generator.noises.*"], ["encoder.input_layer.0.weight"])
            return Imported(f"released {name} checkpoint", net, average="the file's", rows=rows + _unused(content))
        result = _alone(decoder, io.latent_average(content), f"{name} checkpoint")
        why = "what=generator" if what == "generator" else "no such encoder here"
        result.rows += [("encoder", len(encoder), f"not used: {why}"), *_unused(content)]
        if what != "generator":
            result.notes.append(f"only its generator and average latent were imported: {reason}.")
        return result
    for key in ("g_ema", "g", "generator", "G_ema", "netG_ema"):
        if isinstance(content.get(key), Mapping):
            candidate = io.tensors_of(content, key)
            if convert.is_generator_state(candidate):
                result = _alone(
                    convert.select(candidate, ""), io.latent_average(content), f"StyleGAN2 checkpoint, {key}"
                )
                if key == "g":
                    result.notes.append("it has no g_ema: the weights of the last step are taken, not their average.")
                result.rows += _unused(content, key)
                return result
    prefixes = {key[: -len("input.input")] for key in state if key.endswith("input.input")}
    if len(prefixes) > MANY:
        raise UserError(f"it holds {len(prefixes)} generators: save one of them alone.")
    found = [prefix for prefix in prefixes if convert.is_generator_state(convert.select(state, prefix))]
    found.sort(key=lambda prefix: (not re.search("ema|average", prefix.lower()), prefix))  # averaged weights first
    if not found:
        raise UserError(explain(content, state))
    result = _alone(convert.select(state, found[0]), io.latent_average(content), "state dict of a StyleGAN2 generator")
    others = len(state) - len(convert.select(state, found[0]))
    if found[0]:
        result.source += f", {found[0]}*"
    if others:
        result.rows.append(("other keys", others, "not used"))
    return result


def _alone(state: dict[str, Tensor], average: Tensor | None, source: str) -> Imported:
    config = convert.infer_generator(state)
    net = build_and_load(lambda: Generator(**config), state, "the generator", ["noises.*"])
    rows = _rows(net, state, ["noises.*"])
    notes = []
    if missing := [name for name, _ in net.named_buffers() if name.startswith("noises.") and name not in state]:
        draws = torch.Generator().manual_seed(NOISE_SEED)
        for name in missing:
            noise = net.get_buffer(name)
            noise.copy_(torch.randn(noise.shape, generator=draws))
        notes.append(f"{len(missing)} noise maps are not in the file and were drawn with seed {NOISE_SEED}.")
    return Imported(source, net, average, "the file's", rows, notes)


def _rows(
    net: nn.Module, state: Mapping[str, Any], allow_missing: list[str] | None = None, adapt: list[str] | None = None
) -> list[tuple[str, int, str]]:
    """What became of the tensors, by part of the network."""
    if isinstance(net, PSP) and not any(key.startswith("generator.") for key in state):
        allow_missing = [*(allow_missing or []), "generator.*"]  # a file that refers to the shipped generator
    report = compare(net, state, allow_missing or [], adapt=adapt or [])
    rows: dict[tuple[str, str], int] = {}
    for part, count, result in report.rows(depth=2):
        top, _, second = part.partition(".")
        name = part if top in ("encoder", "generator") and second else top
        if name == "latent_avg" and result.startswith("left"):
            result = "matched"  # it lies beside the state dict
        if result == "adapted":
            result = "adapted: its input channels"
        elif name in ("noises", "generator.noises") and result.startswith("left"):
            result = "drawn: not in the file"
        rows[name, result] = rows.get((name, result), 0) + count
    return [(name, count, result) for (name, result), count in rows.items()]


def _unused(content: Mapping[str, Any], used: str = "state_dict") -> list[tuple[str, int, str]]:
    """Rows of what else a training's checkpoint holds."""
    skip = {used, "latent_avg", "opts", "psp"}
    return [
        (str(key)[:40], len(value), "not used: no weights of the network")
        for key, value in content.items()
        if key not in skip and isinstance(value, Mapping) and value
    ]


def _short_average(file: Path, average: Tensor, net: Generator) -> Tensor:
    """(style_dim,) where all styles have the same average, as they nearly always do."""
    if average.shape[-1:] != (net.style_dim,) or average.numel() not in (net.style_dim, net.style_dim * net.n_styles):
        raise UserError(
            f"{file}: its latent_avg of shape {tuple(average.shape)} does not fit {net.n_styles} styles of "
            f"{net.style_dim} numbers; latent_avg=computed computes one."
        )
    average = average.to(torch.float32).reshape(-1, net.style_dim)
    if not bool(average.isfinite().all()):
        raise UserError(f"{file}: its latent_avg is not finite; latent_avg=computed computes one.")
    return average[0].clone() if bool((average == average[0]).all()) else average.clone()


def _check_finite(file: Path, net: nn.Module) -> None:
    for name, tensor in net.state_dict().items():
        if tensor.is_complex() or not bool(tensor.isfinite().all()):
            raise UserError(f"{file} holds values that are not finite in {name}: its weights cannot be used.")

"""Import weight files of any supported layout as networks, which can be saved as self-describing files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from psp_lightning.checkpoints.file_kinds import file_kind
from psp_lightning.checkpoints.read import read_checkpoint, resolve, select, tensors_of
from psp_lightning.checkpoints.safetensors_io import check_described, read_tensors
from psp_lightning.checkpoints.strict import wrap_errors
from psp_lightning.checkpoints.weight_files import COMPUTED, restore_generator, restore_psp, restore_trained
from psp_lightning.importers import nvidia, published
from psp_lightning.importers.detect import explain
from psp_lightning.importers.report import Imported, rows_of, unused_rows
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator, StyledConv, ToRGB
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

WHAT = ("all", "generator")
AVERAGES = ("stored", "computed")
NOISE_SEED = 0
CLAMP_IMAGES = 2
MANY = 20  # generators in one state dict
GENERATOR_KEYS = ("g_ema", "g", "generator", "G_ema", "netG_ema")  # in order of preference
THEIR_AVERAGE = "the file's"


def import_file(
    path: str | os.PathLike[str],
    label: int | None = None,
    what: str = "all",
    average: str = "stored",
    in_channels: int | None = None,
) -> Imported:
    """Read a file of weights without running anything in it.

    Args:
        path: a rosinality `.pt`, an NVIDIA StyleGAN2 `.pkl`, a released pSp, e4e or ReStyle `.pt`, a state dict in one
            of these layouts, a file or run folder of this library, or the name of shipped weights.
        label: class of a conditional NVIDIA generator.
        what: `all`, or `generator` to drop an encoder.
        average: `stored`, or `computed` to compute a generator's average latent instead.
        in_channels: new number of input channels of a released encoder.

    Raises:
        UserError: the file cannot be imported; the message says what it is and what can be done.
    """
    file = resolve(path, generator=True)
    result = _read(file, label, what, in_channels)
    if what == "generator" and isinstance(result.net, PSP):
        result = _without_encoder(result, result.net)
    if not isinstance(result.net, PSP):
        if in_channels is not None:
            raise UserError(f"in_channels={in_channels} is for encoders, but only a generator is imported from {file}.")
        if average == "computed":
            result.latent_avg, result.average = None, COMPUTED
        elif result.latent_avg is not None:
            result.latent_avg = _short_average(file, result.latent_avg, result.net)
        else:
            result.average = f"{COMPUTED} (the file has none)"
    for name, tensor in result.net.state_dict().items():
        if tensor.is_complex() or not bool(tensor.isfinite().all()):
            raise UserError(f"{file} has values that are not finite in {name}: its weights cannot be used.")
    result.net.eval()
    result.facts = {
        "file": file.name, "sha256": locate.sha256(file), "layout": result.source, "made_by": "psp-weights import",
        **result.facts,
    }  # fmt: skip
    return result


def _read(file: Path, label: int | None, what: str, in_channels: int | None) -> Imported:
    """Read a file according to its kind and its layout."""
    kind = file_kind(file)
    if kind == "pickle":
        content = nvidia.read_nvidia(file)
        with wrap_errors(file):
            return _nvidia(nvidia.convert_nvidia(content, label), "NVIDIA StyleGAN2 pickle")
    if kind == "safetensors":
        description, content = read_tensors(file)
        if description is not None:
            _reject_label(label, file)
            return _own_file(file, *check_described(file, description, content, ("psp", "generator")))
    else:
        content = read_checkpoint(file, kind)
    with wrap_errors(file):
        state = tensors_of(content)
        if nvidia.is_nvidia_state(state):
            return _nvidia(nvidia.convert_nvidia_state(state, label), "state dict in NVIDIA's layout")
    _reject_label(label, file)
    with wrap_errors(file):
        if "psp" in content:
            net = restore_trained(content)
            return Imported("checkpoint of psp-train", net, None, THEIR_AVERAGE, rows_of(net, net.state_dict()))
        return _published(content, state, what, in_channels)


def _reject_label(label: int | None, file: Path) -> None:
    if label is not None:
        raise UserError(f"label={label} is for NVIDIA's conditional networks; {file} takes no labels.")


def _own_file(file: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> Imported:
    """Import a self-describing file, with the facts on its origin."""
    if description["kind"] == "psp":
        net = restore_psp(file, description, tensors)
        result = Imported("pSp network of this library", net, average=THEIR_AVERAGE)
    else:
        generator, average = restore_generator(file, description, tensors)
        made = str(description.get("latent_avg", THEIR_AVERAGE))
        result = Imported("generator of this library", generator, average, made)
        tensors.pop("latent_avg", None)
    result.rows = rows_of(result.net, tensors)
    origin = description.get("origin")
    result.facts = dict(origin) if isinstance(origin, Mapping) else {}
    return result


def _without_encoder(result: Imported, net: PSP) -> Imported:
    rows = [row for row in result.rows if not row[0].startswith("encoder")]
    rows.append(("encoder", len(net.encoder.state_dict()), "not used: what=generator"))
    return Imported(result.source, result.generator, net.latent_avg, THEIR_AVERAGE, rows, result.notes, result.facts)


def _short_average(file: Path, average: Tensor, net: Generator) -> Tensor:
    """Return the average as (style_dim,) if it is the same for all styles, as it nearly always is."""
    if average.shape[-1:] != (net.style_dim,) or average.numel() not in (net.style_dim, net.style_dim * net.n_styles):
        raise UserError(
            f"{file}: its latent_avg of shape {tuple(average.shape)} does not fit {net.n_styles} styles of "
            f"{net.style_dim} numbers. Use latent_avg=computed."
        )
    average = average.to(torch.float32).reshape(-1, net.style_dim)
    if not bool(average.isfinite().all()):
        raise UserError(f"{file}: its latent_avg is not finite. Use latent_avg=computed.")
    return average[0].clone() if bool((average == average[0]).all()) else average.clone()


# --- NVIDIA's layout ------------------------------------------------------------------------------------------------


def _nvidia(found: nvidia.NvidiaGenerator, source: str) -> Imported:
    net = published.build_generator(found.state)
    rows = [
        (part, count, f"adapted: {found.adapted[part]}" if part in found.adapted else result)
        for part, count, result in rows_of(net, found.state)
    ]
    source = f"{source}, {found.facts['network']}"
    result = Imported(source, net, found.latent_avg, "the file's w_avg", rows, found.notes, found.facts)
    clamp = found.facts.get("activation_clamp")
    if clamp is not None:
        largest = largest_activation(net)
        effect = "images can differ slightly" if largest > clamp else "the clamp has no effect"
        result.notes.append(
            f"its layers clamp activations at {clamp}, for float16; in float32 nothing is clamped here. The largest "
            f"activation of {CLAMP_IMAGES} images is {largest:.4g}: {effect}."
        )
    return result


@torch.no_grad()
def largest_activation(generator: Generator) -> float:
    """Return the largest absolute output of any layer, for two latents from a fixed seed."""
    largest = 0.0

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        if isinstance(module, (StyledConv, ToRGB)):
            largest = max(largest, float(output.abs().max()))

    z = torch.randn(CLAMP_IMAGES, generator.z_dim, generator=torch.Generator().manual_seed(0))
    with register_module_forward_hook(hook):
        for row in z.split(1):
            generator(row)
    return largest


# --- the published PyTorch layout: rosinality, pSp, e4e, ReStyle and others with the same tensors --------------------


def _published(content: Mapping[str, Any], state: Mapping[str, Any], what: str, in_channels: int | None) -> Imported:
    encoder, decoder = select(state, "encoder."), select(state, "decoder.")
    if encoder and published.is_generator_state(decoder):
        return _released(content, encoder, decoder, what, in_channels)
    for key in GENERATOR_KEYS:
        if isinstance(content.get(key), Mapping):
            candidate = tensors_of(content, key)
            if published.is_generator_state(candidate):
                average = published.latent_average(content)
                result = _generator(select(candidate, ""), average, f"StyleGAN2 checkpoint, {key}")
                if key == "g":
                    result.notes.append("it has no g_ema: the weights of the last step are used, not their average.")
                result.rows += unused_rows(content, key)
                return result
    prefix = _prefix(content, state)
    tensors = select(state, prefix)
    source = "state dict of a StyleGAN2 generator" + (f", {prefix}*" if prefix else "")
    result = _generator(tensors, published.latent_average(content), source)
    if others := len(state) - len(tensors):
        result.rows.append(("other keys", others, "not used"))
    return result


def _prefix(content: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the prefix of a generator's keys; if there are several, prefer averaged weights."""
    prefixes = {key.removesuffix("input.input") for key in state if key.endswith("input.input")}
    if len(prefixes) > MANY:
        raise UserError(f"it contains {len(prefixes)} generators: save only one of them.")
    found = [prefix for prefix in prefixes if published.is_generator_state(select(state, prefix))]
    if not found:
        raise UserError(explain(content, state))
    return min(found, key=lambda prefix: (not re.search("ema|average", prefix.lower()), prefix))


def _released(
    content: Mapping[str, Any],
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor],
    what: str,
    in_channels: int | None,
) -> Imported:
    """Import a checkpoint of pSp, e4e or ReStyle, or only its generator if the encoder is unwanted or unsupported."""
    opts = published.read_options(content)
    name, reason = published.repository(encoder, opts), published.why_not_built(encoder, opts)
    if reason is None and what == "all":
        net = published.load_released(content, in_channels)
        given = {f"encoder.{k}": v for k, v in encoder.items()} | {f"generator.{k}": v for k, v in decoder.items()}
        rows = rows_of(net, given, ["latent_avg", "generator.noises.*"], ["encoder.input_layer.0.weight"])
        return Imported(f"released {name} checkpoint", net, None, THEIR_AVERAGE, rows + unused_rows(content))
    result = _generator(decoder, published.latent_average(content), f"{name} checkpoint")
    why = "what=generator" if what == "generator" else "unsupported encoder"
    result.rows += [("encoder", len(encoder), f"not used: {why}"), *unused_rows(content)]
    if what != "generator":
        result.notes.append(f"only its generator and average latent were imported: {reason}.")
    return result


def _generator(state: dict[str, Tensor], average: Tensor | None, source: str) -> Imported:
    net = published.build_generator(state)
    result = Imported(source, net, average, THEIR_AVERAGE, rows_of(net, state, ["noises.*"]))
    missing = [name for name, _ in net.named_buffers() if name.startswith("noises.") and name not in state]
    draws = torch.Generator().manual_seed(NOISE_SEED)
    for name in missing:
        noise = net.get_buffer(name)
        noise.copy_(torch.randn(noise.shape, generator=draws))
    if missing:
        result.notes.append(f"{len(missing)} noise maps are missing in the file and were drawn with seed {NOISE_SEED}.")
    return result

"""NVIDIA's StyleGAN2 pickles (stylegan2-ada-pytorch, and the StyleGAN2 of the stylegan3 repository) as ours.

Both layouts hold the same network. What differs: names; weights scaled when used with gains that the pickle's layers
say; noise and biases without their axes of one; a filter for each layer; labels, which ours does not have.

Source: names, shapes and gains of NVlabs/stylegan2-ada-pytorch, commit d72cc7d; images and codes checked against it
(`ada_*` of tests/golden).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.strict import first
from psp_lightning.checkpoints.torch_files import COPIES, ROOM, PickledNetwork, said
from psp_lightning.importers.published import LARGEST_BLOCKS
from psp_lightning.models.stylegan2 import FIRFilter
from psp_lightning.utils.errors import UserError

LR_MULTIPLIER = 0.01  # of the mapping layers in our layout
NETWORKS = ("G_ema", "G")  # in order of preference: averaged weights make the better images


@dataclass
class NvidiaGenerator:
    """A generator out of a pickle.

    Attributes:
        state: tensors in the published layout.
        latent_avg: (style_dim,), or None where the pickle has none.
        facts: what its description should record: the pickle's network, label, activation clamp.
        adapted: by part of the state, what was done besides renaming.
        notes: what a user should know, one sentence each.
    """

    state: dict[str, Tensor]
    latent_avg: Tensor | None
    facts: dict[str, Any]
    adapted: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert_nvidia(content: Any, label: int | None = None) -> NvidiaGenerator:
    """The generator of what `read_pickle` gave.

    Args:
        content: a dict with `G_ema` (else `G`), or a network itself.
        label: class whose images the generator shall make, where the pickle's takes labels; it becomes part of the
            weights, see `_bake_label`.

    Raises:
        UserError: no generator of StyleGAN2, with what it is; one of an architecture that ours is not; a `label` that
            is missing, too many or out of range; tensors that do not fit each other.
    """
    name, network = _pick(content)
    _check_kind(network)
    reader = _Reader(network)
    result = NvidiaGenerator({}, None, {"network": name})
    if name == "G":
        result.notes.append("it has no G_ema: the weights of the last training step are taken, not their average.")
    _mapping(reader, result, label)
    _synthesis(reader, result)
    reader.finish()
    return result


def _pick(content: Any) -> tuple[str, PickledNetwork]:
    if isinstance(content, PickledNetwork):
        return content.class_name, content
    if isinstance(content, Mapping):
        for name in NETWORKS:
            if isinstance(content.get(name), PickledNetwork):
                return name, content[name]
        networks = [f"{k} ({v.class_name})" for k, v in content.items() if isinstance(v, PickledNetwork)]
        keys = first(networks or map(str, content), 8) or "nothing"
        raise UserError(f"this pickle holds no network G_ema or G; it holds {keys}.")
    raise UserError(f"this pickle holds a {type(content).__name__}, not NVIDIA's dict of networks.")


def _check_kind(network: PickledNetwork) -> None:
    parts = network.part("_modules")
    synthesis = parts.get("synthesis")
    inner = list(synthesis.part("_modules")) if isinstance(synthesis, PickledNetwork) else []
    if "input" in inner or any(re.match(r"L\d+_\d+_\d+$", name) for name in inner):
        raise UserError(
            "this is a StyleGAN3 generator (Fourier input, alias-free layers). pSp needs a StyleGAN2 one: train or "
            "take one of that kind, in the stylegan3 repository with --cfg=stylegan2."
        )
    if "mapping" not in parts or "b4" not in inner:
        names = first(parts, 6) or "nothing"
        raise UserError(
            f"this is no StyleGAN2 generator: a {network.class_name} of {names}. Supported are the StyleGAN2 networks "
            "of stylegan2-ada-pytorch and stylegan3."
        )


class _Reader:
    """Hands out a network's tensors and attributes by path and remembers what was not asked for."""

    def __init__(self, network: PickledNetwork) -> None:
        self.modules: dict[str, PickledNetwork] = {}
        self.tensors: dict[str, Tensor] = {}
        pending = [("", network)]
        while pending:
            prefix, module = pending.pop()
            if prefix in self.modules or len(self.modules) > 10_000 or prefix.count(".") > 8:
                raise UserError("its modules are nested more deeply than any generator's.")
            self.modules[prefix] = module
            for kind in ("_parameters", "_buffers"):
                for name, value in module.part(kind).items():
                    if not isinstance(value, Tensor):
                        raise UserError(f"its {prefix}{name} is a {type(value).__name__}, not a tensor.")
                    self.tensors[prefix + name] = value
            if len(self.tensors) > 100_000:
                raise UserError("it has more tensors than any generator.")
            for name, value in module.part("_modules").items():
                if isinstance(value, PickledNetwork):
                    pending.append((f"{prefix}{name}.", value))
        distinct = sum({id(t): t.numel() for t in self.tensors.values()}.values())
        if sum(t.numel() for t in self.tensors.values()) > COPIES * distinct + ROOM:
            raise UserError("its modules share tensors, so that it would be far larger than its file.")

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The float32 tensor `name`; `shape`: expected sides, None for any.

        Raises:
            UserError: it is missing, of another shape, or not finite.
        """
        if name not in self.tensors:
            raise UserError(f"its {name} is missing.")
        tensor = self.tensors.pop(name)
        fits = tensor.ndim == len(shape) and all(
            wanted in (None, side) for wanted, side in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise UserError(f"its {name} has shape {tuple(tensor.shape)}, expected ({wanted}).")
        tensor = tensor.to(torch.float32, copy=True)
        if not bool(tensor.isfinite().all()):
            raise UserError(f"its {name} holds values that are not finite: its weights cannot be used.")
        return tensor

    def attribute(self, module: str, name: str, default: Any = None) -> Any:
        return self.modules[module].state.get(name, default) if module in self.modules else default

    def gain(self, module: str, name: str, default: float) -> float:
        """A layer's factor, as the pickle says, else as its constructor would make it."""
        value = self.attribute(module, name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"its {module}{name} is {said(value)}, not a positive number.")
        return float(value)

    def finish(self) -> None:
        if self.tensors:
            names = first(self.tensors)
            raise UserError(f"{len(self.tensors)} of its tensors belong to no StyleGAN2 generator known here: {names}.")


def _linear(reader: _Reader, name: str, in_features: int | None, lr: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a fully connected layer, scaled for a layer of ours with the learning rate multiplier `lr`."""
    weight = reader.take(f"{name}weight", None, in_features)
    bias = reader.take(f"{name}bias", weight.shape[0])
    width = weight.shape[1]
    weight_gain = reader.gain(name, "weight_gain", lr / math.sqrt(width))
    bias_gain = reader.gain(name, "bias_gain", lr)
    return weight * (weight_gain * math.sqrt(width) / lr), bias * (bias_gain / lr)


def _mapping(reader: _Reader, result: NvidiaGenerator, label: int | None) -> None:
    layers = sorted(int(m[1]) for m in (re.fullmatch(r"mapping\.fc(\d+)\.", name) for name in reader.modules) if m)
    if not layers or layers != list(range(len(layers))):
        raise UserError("its mapping network has no layers fc0, fc1, ...")
    classes = 0
    if "mapping.embed." in reader.modules:
        classes = int(reader.tensors.get("mapping.embed.weight", torch.empty(0, 0)).shape[-1])
    _check_label(classes, label)
    for i in layers:
        activation = reader.attribute(f"mapping.fc{i}.", "activation", "lrelu")
        if activation != "lrelu":
            raise UserError(f"its mapping network uses the activation {said(activation)}; ours has lrelu only.")
        weight, bias = _linear(reader, f"mapping.fc{i}.", None, LR_MULTIPLIER)
        if i == 0 and classes:
            weight, bias = _bake_label(reader, weight, bias, label or 0)
            result.facts["label"] = label
            result.adapted["style"] = f"label {label} of {classes} became part of the first layer"
        result.state[f"style.{i + 1}.weight"], result.state[f"style.{i + 1}.bias"] = weight, bias
    w_dim = result.state[f"style.{len(layers)}.weight"].shape[0]
    widths = {result.state[f"style.{i + 1}.weight"].shape[0] for i in layers}
    if widths != {w_dim} or any(result.state[f"style.{i + 1}.weight"].shape[1] != w_dim for i in layers[1:]):
        raise UserError(f"its mapping layers have widths {sorted(widths)}, ours have that of w ({w_dim}) throughout.")
    if "mapping.w_avg" in reader.tensors:
        result.latent_avg = reader.take("mapping.w_avg", w_dim)
        if classes:
            result.notes.append(
                "latent_avg is the pickle's w_avg, over all labels; latent_avg=computed gives that of this label."
            )


def _check_label(classes: int, label: int | None) -> None:
    if classes and label is None:
        raise UserError(f"it takes labels: choose the class with label=0 to label={classes - 1}, one for each import.")
    if not classes and label is not None:
        raise UserError(f"it takes no labels: leave label={label} out.")
    if classes and not 0 <= (label or 0) < classes:
        raise UserError(f"label={label}: its classes are 0 to {classes - 1}.")


def _bake_label(reader: _Reader, weight: Tensor, bias: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """The first mapping layer for one label.

    The network feeds it `[norm(z), norm(embed(label))]`, each half normalised on its own. The second half is constant,
    so that its product with the weight is a bias. Our layer is `lr / sqrt(width) * weight`, of the narrower width.
    """
    embed_weight, embed_bias = _linear(reader, "mapping.embed.", None, 1.0)
    # the used weight of the embedding's column, plus its bias
    embedding = embed_weight[:, label] / math.sqrt(embed_weight.shape[1]) + embed_bias
    embedding = embedding * (embedding.square().mean() + 1e-8).rsqrt()
    width = weight.shape[1]
    z_dim = width - embedding.numel()
    if z_dim < 1:
        raise UserError("it makes images from labels alone, without z: ours needs z.")
    constant = weight[:, z_dim:] @ embedding / math.sqrt(width)  # lr is in both, our layer multiplies the bias by it
    return weight[:, :z_dim] * math.sqrt(z_dim / width), bias + constant


def _synthesis(reader: _Reader, result: NvidiaGenerator) -> None:
    found = [re.fullmatch(r"synthesis\.b(\d+)\.", name) for name in reader.modules]
    sides = sorted(int(match[1]) for match in found if match)
    if len(sides) > LARGEST_BLOCKS + 1:
        raise UserError(f"its {len(sides)} blocks would make images of {sides[-1]} pixels.")
    if len(sides) < 2 or sides != [4 << i for i in range(len(sides))]:
        raise UserError(f"its blocks have the resolutions {sides[:12]}, expected 4, 8, 16, ...")
    state = result.state
    w_dim = state["style.1.weight"].shape[0]
    clamps = {reader.attribute(name, "conv_clamp") for name in reader.modules if name.startswith("synthesis.b")}
    clamps -= {None}
    if not all(isinstance(clamp, (int, float)) for clamp in clamps) or len(clamps) > 1:
        raise UserError("its activation clamps differ between layers.")
    result.facts["activation_clamp"] = clamps.pop() if clamps else None
    for index, side in enumerate(sides):
        block = f"synthesis.b{side}."
        architecture = reader.attribute(block, "architecture", "skip")
        if architecture != "skip" or f"{block}skip." in reader.modules:
            raise UserError(
                f"its architecture is {said(architecture)}; ours is 'skip', as in all published generators."
            )
        _filter(reader, block)
        if index == 0:
            state["input.input"] = reader.take(f"{block}const", None, 4, 4)[None]
            convs, rgb = {"conv1": "conv1"}, "to_rgb1"
        else:
            convs = {"conv0": f"convs.{2 * index - 2}", "conv1": f"convs.{2 * index - 1}"}
            rgb = f"to_rgbs.{index - 1}"
        for theirs, ours in convs.items():
            number = 2 * index - (theirs == "conv0")
            _convolution(reader, result, f"{block}{theirs}.", ours, number, side, w_dim)
            if theirs == "conv0":
                state[f"{ours}.conv.blur.kernel"] = FIRFilter(gain=4).kernel
        _to_rgb(reader, state, f"{block}torgb.", rgb, w_dim)
        if index:
            state[f"{rgb}.upsample.kernel"] = FIRFilter(gain=4).kernel


def _filter(reader: _Reader, module: str) -> None:
    """Takes a layer's filter off the list; it must be the published one."""
    name = f"{module}resample_filter"
    if name in reader.tensors:
        kernel = reader.take(name, None, None)
        if kernel.shape != (4, 4) or not torch.allclose(kernel, FIRFilter(gain=1).kernel, atol=1e-5):
            raise UserError(f"its {name} is not the filter [1, 3, 3, 1] of StyleGAN2.")


def _convolution(
    reader: _Reader, result: NvidiaGenerator, theirs: str, ours: str, number: int, side: int, w_dim: int
) -> None:
    state = result.state
    activation = reader.attribute(theirs, "activation", "lrelu")
    if activation != "lrelu":
        raise UserError(f"its {theirs}activation is {said(activation)}; ours has lrelu only.")
    weight = reader.take(f"{theirs}weight", None, None, 3, 3)
    state[f"{ours}.conv.weight"] = weight[None]
    affine, affine_bias = _linear(reader, f"{theirs}affine.", w_dim, 1.0)
    state[f"{ours}.conv.modulation.weight"], state[f"{ours}.conv.modulation.bias"] = affine, affine_bias
    state[f"{ours}.activate.bias"] = reader.take(f"{theirs}bias", weight.shape[0])
    if f"{theirs}noise_strength" in reader.tensors:
        state[f"{ours}.noise.weight"] = reader.take(f"{theirs}noise_strength").reshape(1)
        state[f"noises.noise_{number}"] = reader.take(f"{theirs}noise_const", side, side)[None, None]
    else:
        state[f"{ours}.noise.weight"] = torch.zeros(1)
        state[f"noises.noise_{number}"] = torch.zeros(1, 1, side, side)
        result.adapted["noises"] = "it has no noise: maps and strengths are zero"
    _filter(reader, theirs)


def _to_rgb(reader: _Reader, state: dict[str, Tensor], theirs: str, ours: str, w_dim: int) -> None:
    weight = reader.take(f"{theirs}weight", None, None, 1, 1)
    # their gain of the weight is a factor of the style; ours scales the weight by the same number
    gain = reader.gain(theirs, "weight_gain", 1 / math.sqrt(weight.shape[1])) * math.sqrt(weight.shape[1])
    state[f"{ours}.conv.weight"] = weight[None] * gain
    affine, affine_bias = _linear(reader, f"{theirs}affine.", w_dim, 1.0)
    state[f"{ours}.conv.modulation.weight"], state[f"{ours}.conv.modulation.bias"] = affine, affine_bias
    state[f"{ours}.bias"] = reader.take(f"{theirs}bias", weight.shape[0])[None, :, None, None]

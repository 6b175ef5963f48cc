"""Import NVIDIA's StyleGAN2 generators (stylegan2-ada-pytorch, and the StyleGAN2 of the stylegan3 repository).

NVIDIA's layout describes the same network as the published one. It differs in several ways: the names differ; weights
are scaled at run time, with gains stored in the pickled layers; noise and biases have no axes of size one; each layer
has a filter; and there are labels, which the published layout does not have.

Source: names, shapes and gains of NVlabs/stylegan2-ada-pytorch, commit d72cc7d. Images and codes were checked against
it (`ada_*` in tests/golden). `Needed by: NAME` names a file of tests/unit/hostile_files.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.strict import first
from psp_lightning.checkpoints.torch_files import COPIES, ROOM, Refused, read_pickle
from psp_lightning.importers.published import LARGEST_BLOCKS
from psp_lightning.models.layers import FIRFilter
from psp_lightning.utils.errors import UserError, clean

LR_MULTIPLIER = 0.01  # learning rate multiplier of the mapping layers in the published layout
NETWORKS = ("G_ema", "G")  # in order of preference: averaged weights make better images
MANY, LONG = 100_000, 200  # limits on modules plus tensors of a network, and on letters of their paths


@dataclass
class NvidiaGenerator:
    """A converted generator.

    Attributes:
        state: tensors in the published layout.
        latent_avg: (style_dim,), or None if the pickle has none.
        facts: entries for the description: the pickle's network, label and activation clamp.
        adapted: changes besides renaming, by part of the state.
        notes: sentences for the user.
    """

    state: dict[str, Tensor]
    latent_avg: Tensor | None
    facts: dict[str, Any]
    adapted: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PickledNetwork:
    """A network as pickled: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]

    def part(self, kind: str) -> dict[str, Any]:
        """Return `_parameters`, `_buffers` or `_modules`, without the entries that are None."""
        found = self.state.get(kind)
        return {str(k): v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}


def read_nvidia(path: str | os.PathLike[str]) -> Any:
    """Read a pickle, with its networks as `PickledNetwork`s.

    A pickled network is a call with its attributes and the Python source of its class. The source is discarded.

    Raises:
        UserError: the pickle is damaged or asks for anything else. Nothing in it was run.
    """
    return read_pickle(path, {"torch_utils.persistence._reconstruct_persistent_obj": _pickled_network})


def _pickled_network(meta: Any) -> PickledNetwork:
    name, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(state, dict):
        raise Refused("a persistent object that is not a network")
    return PickledNetwork(clean(name, 200), state)


def convert_nvidia(content: Any, label: int | None = None) -> NvidiaGenerator:
    """Convert the generator in the result of `read_nvidia`.

    Args:
        content: a dict with `G_ema` or `G`, or a network.
        label: the class to generate, for a conditional generator; it becomes part of the weights, see `_bake_label`.

    Raises:
        UserError: the content is not a StyleGAN2 generator (the message says what it is), the architecture is not
            supported, `label` is missing, superfluous or out of range, or the tensors do not fit together.
    """
    if isinstance(content, PickledNetwork):
        name, network = content.class_name, content
    elif isinstance(content, Mapping):
        networks = {str(k): v for k, v in content.items() if isinstance(v, PickledNetwork)}
        name = next((name for name in NETWORKS if name in networks), "")
        if not name:
            keys = first([f"{k} ({v.class_name})" for k, v in networks.items()] or map(str, content), 8) or "nothing"
            raise UserError(f"this pickle contains no network G_ema or G; it contains {keys}.")
        network = networks[name]
    else:
        raise UserError(f"this pickle contains a {type(content).__name__}, not NVIDIA's dict of networks.")
    result = _convert(_flatten(network), name, network.class_name, label)
    if name == "G":
        result.notes.append("it has no G_ema: the weights of the last training step are used instead of their average.")
    return result


def is_nvidia_state(state: Mapping[str, Any]) -> bool:
    """Return whether the keys belong to NVIDIA's StyleGAN2 or StyleGAN3, under any prefix."""
    return any(re.match(r"(.*\.)?synthesis\.(b4|input|L\d)", key) for key in state)


def convert_nvidia_state(state: Mapping[str, Any], label: int | None = None) -> NvidiaGenerator:
    """Convert a state dict in NVIDIA's layout, with its constructors' gains; otherwise like `convert_nvidia`."""
    prefix = next(m[1] or "" for m in (re.match(r"(.*\.)?synthesis\.", key) for key in state) if m)
    tensors = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix) and isinstance(v, Tensor)}
    if any(len(name) > LONG for name in tensors):  # Needed by: a name of dots
        raise UserError("it has longer names than any generator.")
    ends = ((key, match.end()) for key in tensors for match in re.finditer(r"\.", key))
    return _convert(_Network({"": {}, **{key[:end]: {} for key, end in ends}}, tensors), "G_ema", "state dict", label)


@dataclass
class _Network:
    """A flattened network: its modules' attributes by path, each ending with a dot, and its tensors not yet taken."""

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Remove and return a tensor as float32; each side of `shape` is its expected size, or None for any.

        Raises:
            UserError: the tensor is missing, has another shape, or is not finite.
        """
        if name not in self.tensors:
            raise UserError(f"its {name} is missing.")
        tensor = self.tensors.pop(name)
        if tensor.ndim != len(shape) or any(a not in (None, b) for a, b in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise UserError(f"its {name} has shape {tuple(tensor.shape)}, expected ({wanted}).")
        tensor = tensor.to(torch.float32, copy=True)
        if not bool(tensor.isfinite().all()):
            raise UserError(f"its {name} has values that are not finite: its weights cannot be used.")
        return tensor

    def attribute(self, module: str, name: str, default: Any = None) -> Any:
        return self.modules.get(module, {}).get(name, default)

    def gain(self, module: str, name: str, default: float) -> float:
        """Return a layer's gain, by default its constructor's."""
        value = self.attribute(module, name, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"its {module}{name} is {_show(value)}, not a positive number.")
        return float(value)

    def check_activation(self, module: str) -> None:
        activation = self.attribute(module, "activation", "lrelu")
        if activation != "lrelu":
            raise UserError(f"its {module}activation is {_show(activation)}; only lrelu is supported.")

    def check_filter(self, module: str) -> None:
        """Take a layer's filter and check that it is the published one."""
        name = f"{module}resample_filter"
        if name in self.tensors:
            kernel = self.take(name, None, None)
            if kernel.shape != (4, 4) or not torch.allclose(kernel, FIRFilter(gain=1).kernel, atol=1e-5):
                raise UserError(f"its {name} is not the filter [1, 3, 3, 1] of StyleGAN2.")


def _flatten(network: PickledNetwork) -> _Network:
    flat = _Network({}, {})
    pending = [("", network)]
    while pending:
        prefix, module = pending.pop()
        parts = {**module.part("_parameters"), **module.part("_buffers")}
        inner = {k: v for k, v in module.part("_modules").items() if isinstance(v, PickledNetwork)}
        # Needed by: a module in itself, a module under two names, shared parameters, a long name again and again
        large = len(flat.modules) + len(flat.tensors) + len(pending) + len(parts) > MANY
        if large or prefix in flat.modules or any(len(prefix) + len(name) > LONG for name in (*parts, *inner)):
            raise UserError("it has more modules and tensors, or longer names, than any generator.")
        flat.modules[prefix] = module.state
        for name, value in parts.items():
            if not isinstance(value, Tensor):
                raise UserError(f"its {prefix}{name} is a {type(value).__name__}, not a tensor.")
            flat.tensors[prefix + name] = value
        pending += [(f"{prefix}{name}.", value) for name, value in inner.items()]
    sizes = {id(tensor): tensor.numel() for tensor in flat.tensors.values()}
    # Needed by: a layer again and again
    if sum(tensor.numel() for tensor in flat.tensors.values()) > COPIES * sum(sizes.values()) + ROOM:
        raise UserError("its modules share tensors, which would make it far larger than its file.")
    return flat


def _show(value: Any) -> str:
    """Return a short text for a value. Needed by: endless activation, endless gain (their repr is endless)."""
    plain = type(value) in (str, int, float, bool, NoneType)
    return clean(repr(value), 40) if plain else f"a {type(value).__name__}"


def _convert(network: _Network, name: str, class_name: str, label: int | None) -> NvidiaGenerator:
    if any(re.match(r"synthesis\.(input|L\d+_\d+_\d+)\.", path) for path in network.modules):
        raise UserError(
            "this is a StyleGAN3 generator (Fourier input, alias-free layers). pSp needs a StyleGAN2: train one in the "
            "stylegan3 repository with --cfg=stylegan2, or use an existing one."
        )
    if "mapping." not in network.modules or "synthesis.b4." not in network.modules:
        names = first([path[:-1] for path in network.modules if path.count(".") == 1], 6) or "nothing"
        raise UserError(
            f"this is not a StyleGAN2 generator but a {class_name} with {names}. The StyleGAN2 networks of "
            "stylegan2-ada-pytorch and stylegan3 are supported."
        )
    result = NvidiaGenerator({}, None, {"network": name})
    _mapping(network, result, label)
    _synthesis(network, result)
    if network.tensors:
        count, names = len(network.tensors), first(network.tensors)
        raise UserError(f"{count} of its tensors belong to no known StyleGAN2 generator: {names}.")
    return result


def _linear(network: _Network, name: str, in_features: int | None, lr: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer, scaled for a published layer with learning rate multiplier `lr`."""
    weight = network.take(f"{name}weight", None, in_features)
    bias = network.take(f"{name}bias", weight.shape[0])
    width = weight.shape[1]
    weight_gain = network.gain(name, "weight_gain", lr / math.sqrt(width))
    bias_gain = network.gain(name, "bias_gain", lr)
    return weight * (weight_gain * math.sqrt(width) / lr), bias * (bias_gain / lr)


def _mapping(network: _Network, result: NvidiaGenerator, label: int | None) -> None:
    depth = sum(re.fullmatch(r"mapping\.fc\d+\.", path) is not None for path in network.modules)
    if not depth:
        raise UserError("its mapping network has no layers fc0, fc1, ...")
    embedding = network.tensors.get("mapping.embed.weight")
    classes = 0 if embedding is None else int(embedding.shape[-1])
    if classes and label is None:
        raise UserError(f"it is conditional: choose one class per import, label=0 to label={classes - 1}.")
    if not classes and label is not None:
        raise UserError(f"it takes no labels: leave out label={label}.")
    if classes and not 0 <= (label or 0) < classes:
        raise UserError(f"label={label}: its classes are 0 to {classes - 1}.")
    layers = []
    for i in range(depth):
        network.check_activation(f"mapping.fc{i}.")
        layers.append(_linear(network, f"mapping.fc{i}.", None, LR_MULTIPLIER))
    if classes:
        layers[0] = _bake_label(network, *layers[0], label or 0)
        result.facts["label"] = label
        result.adapted["style"] = f"label {label} of {classes} became part of the first layer"
    w_dim = layers[-1][0].shape[0]
    for i, (weight, bias) in enumerate(layers):
        if weight.shape[0] != w_dim or (i and weight.shape[1] != w_dim):
            raise UserError(
                f"its mapping layer fc{i} has shape {tuple(weight.shape)}, but w has {w_dim} numbers: layers of other "
                "widths are not supported."
            )
        result.state[f"style.{i + 1}.weight"], result.state[f"style.{i + 1}.bias"] = weight, bias
    if "mapping.w_avg" in network.tensors:
        result.latent_avg = network.take("mapping.w_avg", w_dim)
        if classes:
            result.notes.append(
                "latent_avg is the pickle's w_avg over all labels; latent_avg=computed gives this label's average."
            )


def _bake_label(network: _Network, weight: Tensor, bias: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the first mapping layer for one label.

    The layer's input is `[norm(z), norm(embed(label))]`, with each half normalised separately. The second half is
    constant, so its product with the weight becomes a bias. The published layer computes with
    `lr / sqrt(width) * weight`, where `width` is the length of z.
    """
    embed_weight, embed_bias = _linear(network, "mapping.embed.", None, 1.0)
    # the label's column as scaled at run time, plus the bias
    embedding = embed_weight[:, label] / math.sqrt(embed_weight.shape[1]) + embed_bias
    embedding = embedding * (embedding.square().mean() + 1e-8).rsqrt()
    width = weight.shape[1]
    z_dim = width - embedding.numel()
    if z_dim < 1:
        raise UserError("it makes images from labels without z, which is not supported.")
    constant = weight[:, z_dim:] @ embedding / math.sqrt(width)  # the layer multiplies both weight and bias by lr
    return weight[:, :z_dim] * math.sqrt(z_dim / width), bias + constant


def _synthesis(network: _Network, result: NvidiaGenerator) -> None:
    found = (re.fullmatch(r"synthesis\.b(\d+)\.", path) for path in network.modules)
    sides = sorted(int(match[1]) for match in found if match)
    if len(sides) > LARGEST_BLOCKS + 1:  # Needed by: very large blocks
        raise UserError(f"its {len(sides)} blocks would make images of {sides[-1]} pixels.")
    if len(sides) < 2 or sides != [4 << i for i in range(len(sides))]:
        raise UserError(f"its blocks have the resolutions {sides}, expected 4, 8, 16, ...")
    clamps = [network.attribute(path, "conv_clamp") for path in network.modules if path.startswith("synthesis.b")]
    clamps = [clamp for clamp in clamps if clamp is not None]
    # Needed by: endless clamp
    if not all(isinstance(clamp, (int, float)) for clamp in clamps) or len(set(clamps)) > 1:
        raise UserError("its activation clamps differ between layers.")
    result.facts["activation_clamp"] = clamps[0] if clamps else None
    w_dim = result.state["style.1.weight"].shape[0]
    for index, side in enumerate(sides):
        block = f"synthesis.b{side}."
        architecture = network.attribute(block, "architecture", "skip")
        if architecture != "skip" or f"{block}skip." in network.modules:
            raise UserError(
                f"its architecture is {_show(architecture)}; only 'skip' is supported, as in all published generators."
            )
        network.check_filter(block)
        if index == 0:
            result.state["input.input"] = network.take(f"{block}const", None, 4, 4)[None]
            _convolution(network, result, f"{block}conv1.", "conv1", 0, side, w_dim)
            _to_rgb(network, result, f"{block}torgb.", "to_rgb1", w_dim)
            continue
        up, conv, rgb = f"convs.{2 * index - 2}", f"convs.{2 * index - 1}", f"to_rgbs.{index - 1}"
        _convolution(network, result, f"{block}conv0.", up, 2 * index - 1, side, w_dim)
        _convolution(network, result, f"{block}conv1.", conv, 2 * index, side, w_dim)
        _to_rgb(network, result, f"{block}torgb.", rgb, w_dim)
        for name in (f"{up}.conv.blur.kernel", f"{rgb}.upsample.kernel"):
            result.state[name] = FIRFilter(gain=4).kernel


def _convolution(
    network: _Network, result: NvidiaGenerator, theirs: str, ours: str, number: int, side: int, w_dim: int
) -> None:
    state = result.state
    network.check_activation(theirs)
    weight = network.take(f"{theirs}weight", None, None, 3, 3)
    state[f"{ours}.conv.weight"] = weight[None]
    affine, affine_bias = _linear(network, f"{theirs}affine.", w_dim, 1.0)
    state[f"{ours}.conv.modulation.weight"], state[f"{ours}.conv.modulation.bias"] = affine, affine_bias
    state[f"{ours}.activate.bias"] = network.take(f"{theirs}bias", weight.shape[0])
    if f"{theirs}noise_strength" in network.tensors:
        state[f"{ours}.noise.weight"] = network.take(f"{theirs}noise_strength").reshape(1)
        state[f"noises.noise_{number}"] = network.take(f"{theirs}noise_const", side, side)[None, None]
    else:
        state[f"{ours}.noise.weight"] = torch.zeros(1)
        state[f"noises.noise_{number}"] = torch.zeros(1, 1, side, side)
        result.adapted["noises"] = "it has no noise: maps and strengths are zero"
    network.check_filter(theirs)


def _to_rgb(network: _Network, result: NvidiaGenerator, theirs: str, ours: str, w_dim: int) -> None:
    state = result.state
    weight = network.take(f"{theirs}weight", None, None, 1, 1)
    # NVIDIA's gain scales the style; scaling the weight has the same effect
    gain = network.gain(theirs, "weight_gain", 1 / math.sqrt(weight.shape[1])) * math.sqrt(weight.shape[1])
    state[f"{ours}.conv.weight"] = weight[None] * gain
    affine, affine_bias = _linear(network, f"{theirs}affine.", w_dim, 1.0)
    state[f"{ours}.conv.modulation.weight"], state[f"{ours}.conv.modulation.bias"] = affine, affine_bias
    state[f"{ours}.bias"] = network.take(f"{theirs}bias", weight.shape[0])[None, :, None, None]

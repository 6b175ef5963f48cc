"""Write pickles as NVIDIA's repositories do: a network is pickled as a call with its source code and attributes."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SOURCE = "import pathlib; pathlib.Path({canary!r}).write_text('the source of the class was executed')\n"


class EasyDict(dict):
    """A stand-in for dnnlib.util.EasyDict."""


def _reconstruct_persistent_obj(meta: dict) -> Any:
    raise AssertionError("only written, never read")


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Provide modules with the names that the pickle refers to, while it is written."""
    torch_utils, persistence = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    dnnlib, util = types.ModuleType("dnnlib"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    names = {"torch_utils": torch_utils, "torch_utils.persistence": persistence, "dnnlib": dnnlib, "dnnlib.util": util}
    before = (_reconstruct_persistent_obj.__module__, EasyDict.__module__)
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    sys.modules.update(names)
    try:
        yield
    finally:
        _reconstruct_persistent_obj.__module__, EasyDict.__module__ = before
        for name in names:
            del sys.modules[name]


class Persistent:
    """A module of NVIDIA's, which is pickled as a call with its class's source code and its attributes."""

    canary = "canary"

    def __init__(self, class_name: str, **attributes: Any) -> None:
        self.class_name = class_name
        self.state: dict[str, Any] = {
            "training": False,
            "_parameters": OrderedDict(),
            "_buffers": OrderedDict(),
            "_non_persistent_buffers_set": set(),
            "_backward_hooks": OrderedDict(),
            "_modules": OrderedDict(),
            **attributes,
            "_init_args": (),
            "_init_kwargs": EasyDict(),
        }

    def __reduce__(self) -> Any:
        source = SOURCE.format(canary=self.canary)
        meta = dict(
            type="class", version=6, module_src=source, class_name=self.class_name, state=self.state
        )  # fmt: skip
        return _reconstruct_persistent_obj, (meta,), None

    def child(self, name: str, class_name: str, **attributes: Any) -> Persistent:
        return self.state["_modules"].setdefault(name, Persistent(class_name, **attributes))

    def put(self, path: str, tensor: Tensor) -> None:
        """Store a tensor under its path, as in a state dict. The modules on the path must exist."""
        *modules, name = path.split(".")
        module = self
        for part in modules:
            module = module.state["_modules"][part]
        if name in ("resample_filter", "noise_const", "w_avg"):
            module.state["_buffers"][name] = tensor
        else:
            module.state["_parameters"][name] = torch.nn.Parameter(tensor)


def linear(width: int, lr: float = 1.0, activation: str = "linear") -> dict[str, Any]:
    # NumPy numbers, as in the original's `lr_multiplier / np.sqrt(in_features)`
    return {"activation": activation, "weight_gain": lr / np.sqrt(width), "bias_gain": lr}


def network(
    tensors: dict[str, Tensor], clamp: int | None = None, architecture: str = "skip", lr: float = 0.01
) -> Persistent:
    """Make a generator in the stylegan2-ada-pytorch layout from its state dict."""
    root = Persistent("Generator")
    mapping, synthesis = root.child("mapping", "MappingNetwork"), root.child("synthesis", "SynthesisNetwork")
    for path, tensor in tensors.items():
        parts = path.split(".")
        if parts[0] == "mapping":
            if parts[1].startswith("fc") and parts[2] == "weight":
                mapping.child(parts[1], "FullyConnectedLayer", **linear(tensor.shape[1], lr, "lrelu"))
            elif parts[1] == "embed" and parts[2] == "weight":
                mapping.child("embed", "FullyConnectedLayer", **linear(tensor.shape[1]))
            continue
        block = synthesis.child(
            parts[1], "SynthesisBlock", architecture=architecture, use_fp16=False, channels_last=False
        )
        if len(parts) == 4 and parts[3] == "weight":
            kind = {"torgb": "ToRGBLayer"}.get(parts[2], "SynthesisLayer")
            attributes: dict[str, Any] = {"conv_clamp": clamp}
            if kind == "ToRGBLayer":
                attributes["weight_gain"] = 1 / np.sqrt(tensor.shape[1])
            else:
                attributes |= {"activation": "lrelu", "act_gain": np.sqrt(2), "use_noise": True}
            block.child(parts[2], kind, **attributes)
            affine = tensors[".".join([*parts[:3], "affine", "weight"])]
            block.state["_modules"][parts[2]].child("affine", "FullyConnectedLayer", **linear(affine.shape[1]))
    for path, tensor in tensors.items():
        root.put(path, tensor)
    return root


def write(path: Any, content: Any, protocol: int = 4, canary: str = "canary") -> Any:
    Persistent.canary = str(canary)
    with stand_ins(), open(path, "wb") as file:
        pickle.dump(content, file, protocol=protocol)
    return path


def snapshot(generator: Persistent) -> dict[str, Any]:
    """Return the content of a training snapshot: G, D, G_ema, the augmentation and the data set's arguments."""
    discriminator = Persistent("Discriminator")
    discriminator.state["_parameters"]["weight"] = torch.nn.Parameter(torch.ones(3))
    return dict(
        G=generator, D=discriminator, G_ema=generator, augment_pipe=None,
        training_set_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", xflip=False),
    )  # fmt: skip


# --- the reverse of an import, and the network's own formulas ------------------------------------------------------


def from_published(state: dict[str, Tensor], average: Tensor | None, lr: float = 0.01) -> dict[str, Tensor]:
    """Convert a generator from the published PyTorch layout to tensors in NVIDIA's layout."""
    tensors: dict[str, Tensor] = {}
    depth = sum(key.startswith("style.") and key.endswith("weight") for key in state)
    for i in range(depth):
        for name in ("weight", "bias"):
            tensors[f"mapping.fc{i}.{name}"] = state[f"style.{i + 1}.{name}"] * (0.01 / lr)
    if average is not None:
        tensors["mapping.w_avg"] = average
    kernel = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64

    def layer(theirs: str, ours: str, number: int) -> None:
        tensors[f"{theirs}.weight"] = state[f"{ours}.conv.weight"][0]
        tensors[f"{theirs}.affine.weight"] = state[f"{ours}.conv.modulation.weight"]
        tensors[f"{theirs}.affine.bias"] = state[f"{ours}.conv.modulation.bias"]
        tensors[f"{theirs}.bias"] = state[f"{ours}.activate.bias"]
        tensors[f"{theirs}.noise_strength"] = state[f"{ours}.noise.weight"].reshape(())
        tensors[f"{theirs}.noise_const"] = state[f"noises.noise_{number}"][0, 0]
        tensors[f"{theirs}.resample_filter"] = kernel.clone()

    def rgb(theirs: str, ours: str) -> None:
        tensors[f"{theirs}.weight"] = state[f"{ours}.conv.weight"][0]
        tensors[f"{theirs}.affine.weight"] = state[f"{ours}.conv.modulation.weight"]
        tensors[f"{theirs}.affine.bias"] = state[f"{ours}.conv.modulation.bias"]
        tensors[f"{theirs}.bias"] = state[f"{ours}.bias"].reshape(-1)

    blocks = sum(key.startswith("to_rgbs.") and key.endswith(".modulation.bias") for key in state)
    tensors["synthesis.b4.const"] = state["input.input"][0]
    layer("synthesis.b4.conv1", "conv1", 0)
    rgb("synthesis.b4.torgb", "to_rgb1")
    for i in range(blocks):
        side = f"synthesis.b{8 << i}"
        layer(f"{side}.conv0", f"convs.{2 * i}", 2 * i + 1)
        layer(f"{side}.conv1", f"convs.{2 * i + 1}", 2 * i + 2)
        rgb(f"{side}.torgb", f"to_rgbs.{i}")
        tensors[f"{side}.resample_filter"] = kernel.clone()
    return tensors


def normalised(x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def conditional_mapping(tensors: dict[str, Tensor], z: Tensor, label: int, lr: float = 0.01) -> Tensor:
    """Compute w of a mapping network with labels from its definition, which normalises each half of its input."""
    embed = tensors["mapping.embed.weight"]
    one_hot = torch.nn.functional.one_hot(torch.tensor([label] * len(z)), embed.shape[1]).float()
    y = one_hot @ (embed / math.sqrt(embed.shape[1])).t() + tensors["mapping.embed.bias"]
    x = torch.cat([normalised(z), normalised(y)], dim=1)
    i = 0
    while f"mapping.fc{i}.weight" in tensors:
        weight, bias = tensors[f"mapping.fc{i}.weight"], tensors[f"mapping.fc{i}.bias"]
        x = x @ (weight * lr / math.sqrt(weight.shape[1])).t() + bias * lr
        x = torch.nn.functional.leaky_relu(x, 0.2) * math.sqrt(2)
        i += 1
    return x

"""Released files of other implementations: their names, key layouts and options, as ours.

Everything is read off the tensors where they tell it, because old files lack options (`output_size`, `learn_in_w`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from psp_lightning.models.encoders import IMAGE_CHANNELS
from psp_lightning.models.irse import BLOCKS
from psp_lightning.utils.errors import UserError, clean

State = dict[str, Tensor]

# encoder_type of pSp (commit 5cfff38) and e4e (99ea505) -> class name in our registry
ENCODER_NAMES: dict[str, str] = {
    "GradualStyleEncoder": "GradualStyleEncoder",
    "BackboneEncoderUsingLastLayerIntoW": "EncoderIntoW",
    "BackboneEncoderUsingLastLayerIntoWPlus": "EncoderIntoWPlus",
    "Encoder4Editing": "Encoder4Editing",
    "SingleStyleCodeEncoder": "EncoderIntoW",
}

# encoder_type of ReStyle (commit 5e80276), which looks at the source and the last output, several times
RESTYLE = {"BackboneEncoder": "ReStyleEncoder", "ProgressiveBackboneEncoder": "ReStyleEncoder4Editing"}
RESTYLE_RESNET = ("ResNetBackboneEncoder", "ResNetProgressiveBackboneEncoder", "ResNetGradualStyleEncoder")

# pSp's dataset_type -> kind of source
SOURCE_KINDS: dict[str, str] = {
    "ffhq_encode": "rgb",
    "ffhq_frontalize": "rgb",
    "toonify": "rgb",
    "celebs_sketch_to_face": "sketch",
    "celebs_seg_to_face": "labels",
    "celebs_super_resolution": "lowres",
}

LARGEST_BLOCKS = 10  # that is 4096 pixels

# what wrappers put in front of the keys: DistributedDataParallel, torch.compile
WRAPPERS = ("module.", "_orig_mod.")


def convert_wrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without the prefixes that wrappers add to every key."""
    result = dict(state)
    for prefix in WRAPPERS:
        if result and all(str(key).startswith(prefix) for key in result):
            result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def select(state: Mapping[str, Any], prefix: str) -> State:
    """The tensors whose key starts with `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix) and isinstance(v, Tensor)}


def is_generator_state(state: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a StyleGAN2 generator in the published PyTorch layout."""
    return {"input.input", "conv1.conv.weight", "to_rgb1.bias", "style.1.weight"} <= set(state)


def infer_generator(state: State) -> dict[str, Any]:
    """Constructor arguments of `Generator` from the shapes of its state dict (published layout).

    Channels that follow no `min(max_channels, channel_base * channel_multiplier // r)` are listed (`channels`).

    Raises:
        UserError: for images of more than 4096 pixels.
    """
    n_blocks = len([k for k in state if re.fullmatch(r"to_rgbs\.\d+\.bias", k)])
    if n_blocks > LARGEST_BLOCKS:
        raise UserError(f"its {n_blocks} up-sampling blocks would make images of {4 << n_blocks} pixels and more.")
    widths = {4: int(state["conv1.conv.weight"].shape[1])}
    for i in range(n_blocks):
        widths[8 << i] = int(state[f"convs.{2 * i}.conv.weight"].shape[1])
    rule = _channel_rule(widths)
    base, multiplier = rule or (16384, 2)
    return {
        "output_size": 4 << n_blocks,
        "style_dim": int(state["style.1.weight"].shape[0]),
        "n_mapping": len([k for k in state if re.fullmatch(r"style\.\d+\.weight", k)]),
        "channel_multiplier": multiplier,
        "max_channels": max(widths.values()),
        "image_channels": int(state["to_rgb1.bias"].shape[1]),
        "z_dim": int(state["style.1.weight"].shape[1]),
        "channel_base": base,
        **({} if rule else {"channels": list(widths.values())}),
    }


def _channel_rule(widths: Mapping[int, int]) -> tuple[int, int] | None:
    """`channel_base` and `channel_multiplier` that give these channels by resolution, None where none do."""
    largest = max(widths.values())
    # where every layer has the largest width several multipliers fit; 2 is the published one
    for multiplier in (2, 1, *range(3, 65)):
        if all(width == min(largest, 16384 * multiplier // r) for r, width in widths.items()):
            return 16384, multiplier
    # other bases: each layer narrower than the largest allows a range of them, the others ask for enough
    low = max(width * r if width > 1 else 1 for r, width in widths.items())
    if all(width == max(1, min(largest, low // r)) for r, width in widths.items()):
        return low, 1
    return None


def project(encoder_state: Mapping[str, Any], opts: Mapping[str, Any]) -> str:
    """Which project an encoder is of: `pSp`, `e4e` or `ReStyle`, whose encoders make several passes."""
    kind = opts.get("encoder_type")
    one_map = "styles.0.linear.weight" in encoder_state and "latlayer1.weight" not in encoder_state
    if "n_iters_per_batch" in opts or kind in (*RESTYLE, *RESTYLE_RESNET) or "conv1.weight" in encoder_state or one_map:
        return "ReStyle"
    return "e4e" if kind == "Encoder4Editing" else "pSp"


def why_not_built(encoder_state: Mapping[str, Any], opts: Mapping[str, Any]) -> str | None:
    """What of an encoder of ReStyle this library does not have, a clause; None: it can be built, or is another's."""
    kind = opts.get("encoder_type")
    if project(encoder_state, opts) != "ReStyle":
        return None
    if kind in RESTYLE_RESNET or "conv1.weight" in encoder_state:
        return "its encoder has a ResNet-34 for body, which this library does not build"
    if opts.get("dataset_type") == "cars_encode":
        return "its sources are of 256x192 pixels, and this library takes squares"
    if kind in RESTYLE:
        return None
    if "latlayer1.weight" in encoder_state:
        return "its encoder is pSp's, run in several passes, which this library does with ReStyle's own encoders alone"
    return f"its opts do not say which encoder it has (encoder_type: {' or '.join(RESTYLE)})"


def infer_encoder(state: State, encoder_type: str | None = None) -> dict[str, Any]:
    """Description ("class" and constructor arguments) of an encoder from the shapes of its state dict.

    Args:
        state: keys as in the released files, without `encoder.`.
        encoder_type: pSp's name of the class; None tells it from the keys.

    Raises:
        UserError: for a class that this library does not have.
    """
    if encoder_type is None:
        if "styles.0.linear.weight" in state:
            encoder_type = "GradualStyleEncoder"
        elif "output_layer_2.3.weight" in state:
            encoder_type = "BackboneEncoderUsingLastLayerIntoWPlus"
        else:
            encoder_type = "BackboneEncoderUsingLastLayerIntoW"
    names = ENCODER_NAMES | RESTYLE
    if not isinstance(encoder_type, str) or encoder_type not in names:
        named = clean(str(encoder_type), 60)
        raise UserError(f"Encoder type {named!r} is not supported; supported: {', '.join(names)}.")

    units = sorted(int(k.split(".")[1]) for k in state if re.fullmatch(r"body\.\d+\.res_layer\.3\.weight", k))
    widths = [int(state[f"body.{i}.res_layer.3.weight"].shape[0]) for i in units]
    blocks = tuple(count for _, count in sorted(Counter(widths).items()))
    depth = next((d for d, b in BLOCKS.items() if b == blocks), None)
    result: dict[str, Any] = {
        "class": names[encoder_type],
        "in_channels": int(state["input_layer.0.weight"].shape[1]) - (IMAGE_CHANNELS if encoder_type in RESTYLE else 0),
        "input_size": 256,
        "n_layers": depth or 50,
        "mode": "ir_se" if "body.0.res_layer.5.fc1.weight" in state else "ir",
        "blocks": None if depth else list(blocks),
        "width": int(state["input_layer.0.weight"].shape[0]),
    }
    if encoder_type in ("GradualStyleEncoder", "Encoder4Editing", *RESTYLE):
        heads = [k for k in state if re.fullmatch(r"styles\.\d+\.linear\.weight", k)]
        halvings = [k for k in state if re.fullmatch(r"styles\.0\.convs\.\d+\.weight", k)]
        result |= {
            "n_styles": len(heads),
            "style_dim": int(state["styles.0.linear.weight"].shape[0]),
            "input_size": 16 << len(halvings),
        }
    elif encoder_type == "BackboneEncoderUsingLastLayerIntoWPlus":
        style_dim = int(state["linear.weight"].shape[1])
        result |= {"style_dim": style_dim, "n_styles": int(state["linear.weight"].shape[0]) // style_dim}
    else:
        result["style_dim"] = int(state["linear.weight"].shape[0])
    return result


def convert_source(opts: Mapping[str, Any], in_channels: int, input_size: int) -> dict[str, Any]:
    """What a released network takes as source, as the plain values of an `InputSpec`.

    Args:
        opts: the file's options; `dataset_type`, `label_nc` and `resize_factors` are read, each may be missing.
        in_channels, input_size: of its encoder; the channels decide where `dataset_type` is missing or unknown.
    """
    kind = SOURCE_KINDS.get(str(opts.get("dataset_type")))
    if kind is None:
        kind = {3: "rgb", 1: "sketch"}.get(in_channels, "labels")
    source: dict[str, Any] = {"kind": kind, "size": input_size}
    if kind == "labels":
        # the released segmentation weights were trained on label maps that were resized bilinearly
        source |= {"n_classes": int(opts.get("label_nc") or in_channels), "interpolation": "legacy_bilinear"}
    if kind == "lowres":
        source["factors"] = _factors(opts.get("resize_factors"))
    return source


def _factors(value: Any) -> list[int]:
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return [int(part) for part in parts]

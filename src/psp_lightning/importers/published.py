"""Convert released files of other implementations: their names, key layouts and options.

Everything possible is inferred from the tensors, because old files lack options (`output_size`, `learn_in_w`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from psp_lightning.checkpoints.read import select, tensors_of
from psp_lightning.checkpoints.strict import build_and_load, first
from psp_lightning.models.encoders import IMAGE_CHANNELS
from psp_lightning.models.irse import BLOCKS
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError, check_tree, clean

State = dict[str, Tensor]

# encoder_type of pSp (commit 5cfff38) and e4e (99ea505) -> class name in this library's registry
ENCODER_NAMES: dict[str, str] = {
    "GradualStyleEncoder": "GradualStyleEncoder",
    "BackboneEncoderUsingLastLayerIntoW": "EncoderIntoW",
    "BackboneEncoderUsingLastLayerIntoWPlus": "EncoderIntoWPlus",
    "Encoder4Editing": "Encoder4Editing",
    "SingleStyleCodeEncoder": "EncoderIntoW",
}

# encoder_type of ReStyle (commit 5e80276), which sees the source and its last output, in several passes
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

LARGEST_BLOCKS = 10  # up-sampling blocks, for 4096 pixels


def is_generator_state(state: Mapping[str, Any]) -> bool:
    """Return whether the keys belong to a StyleGAN2 generator in the published PyTorch layout."""
    return {"input.input", "conv1.conv.weight", "to_rgb1.bias", "style.1.weight"} <= set(state)


def infer_generator(state: State) -> dict[str, Any]:
    """Infer the constructor arguments of `Generator` from the shapes of its state dict (published layout).

    Channels that do not follow `min(max_channels, channel_base * channel_multiplier // r)` are listed in `channels`.

    Raises:
        UserError: the images are larger than 4096 pixels.
    """
    n_blocks = len([k for k in state if re.fullmatch(r"to_rgbs\.\d+\.bias", k)])
    if n_blocks > LARGEST_BLOCKS:
        raise UserError(f"its {n_blocks} up-sampling blocks would make images of {4 << n_blocks} pixels or more.")
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
    """Return the `channel_base` and `channel_multiplier` that give these channels by resolution, if any do."""
    largest = max(widths.values())
    # if every layer has the largest width, several multipliers fit; 2 is the published one
    for multiplier in (2, 1, *range(3, 65)):
        if all(width == min(largest, 16384 * multiplier // r) for r, width in widths.items()):
            return 16384, multiplier
    # other bases: layers narrower than the largest allow a range of them, the others require a minimum
    low = max(width * r if width > 1 else 1 for r, width in widths.items())
    if all(width == max(1, min(largest, low // r)) for r, width in widths.items()):
        return low, 1
    return None


def repository(encoder_state: Mapping[str, Any], opts: Mapping[str, Any]) -> str:
    """Return which repository an encoder comes from: `pSp`, `e4e` or `ReStyle`, whose encoders run several passes."""
    kind = opts.get("encoder_type")
    one_map = "styles.0.linear.weight" in encoder_state and "latlayer1.weight" not in encoder_state
    if "n_iters_per_batch" in opts or kind in (*RESTYLE, *RESTYLE_RESNET) or "conv1.weight" in encoder_state or one_map:
        return "ReStyle"
    return "e4e" if kind == "Encoder4Editing" else "pSp"


def why_not_built(encoder_state: Mapping[str, Any], opts: Mapping[str, Any]) -> str | None:
    """Return a clause that says why a ReStyle encoder is not supported; None if it is supported or is not ReStyle's."""
    kind = opts.get("encoder_type")
    if repository(encoder_state, opts) != "ReStyle":
        return None
    if kind in RESTYLE_RESNET or "conv1.weight" in encoder_state:
        return "its encoder has a ResNet-34 as its body, which this library does not support"
    if opts.get("dataset_type") == "cars_encode":
        return "its sources have 256x192 pixels, and this library needs squares"
    if kind in RESTYLE:
        return None
    if "latlayer1.weight" in encoder_state:
        return "its encoder is pSp's in several passes, which this library supports only for ReStyle's own encoders"
    return f"its opts do not say which encoder it has (encoder_type: {' or '.join(RESTYLE)})"


def infer_encoder(state: State, encoder_type: str | None = None) -> dict[str, Any]:
    """Infer an encoder's description ("class" and constructor arguments) from the shapes of its state dict.

    Args:
        state: keys as in the released files, without `encoder.`.
        encoder_type: pSp's name of the class; if None, it is inferred from the keys.

    Raises:
        UserError: this library does not have the class.
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
    """Convert a file's options to the plain values of an `InputSpec`.

    Args:
        opts: `dataset_type`, `label_nc` and `resize_factors` are used; each may be missing.
        in_channels, input_size: of the encoder; if `dataset_type` is missing or unknown, the channels decide.
    """
    by_channels = {3: "rgb", 1: "sketch"}.get(in_channels, "labels")
    kind = SOURCE_KINDS.get(str(opts.get("dataset_type")), by_channels)
    source: dict[str, Any] = {"kind": kind, "size": input_size}
    if opts.get("dataset_type") == "ffhq_frontalize":
        source["task"] = "frontalization"
    if kind == "labels":
        # the released segmentation networks were trained on bilinearly resized label maps
        source |= {"n_classes": int(opts.get("label_nc") or in_channels), "interpolation": "legacy_bilinear"}
    if kind == "lowres":
        source["factors"] = _factors(opts.get("resize_factors"))
    return source


def _factors(value: Any) -> list[int]:
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return [int(part) for part in parts]


def load_released(content: Mapping[str, Any], in_channels: int | None = None) -> PSP:
    """Build the network of a released pSp, e4e or ReStyle checkpoint.

    Args:
        content: the result of `checkpoints.read.read`.
        in_channels: new number of input channels; the encoder's first layer is adapted, see
            `checkpoints.strict.adapt_channels`.

    Raises:
        UserError: the checkpoint is something else (the message says what), has an unsupported encoder, or has tensors
            that do not fit together.
    """
    state = tensors_of(content)
    encoder_state, decoder_state = select(state, "encoder."), select(state, "decoder.")
    if not encoder_state or not is_generator_state(decoder_state):
        what = f"It has no encoder.* and decoder.* tensors; its keys are: {first(map(str, state)) or 'none'}."
        if "g_ema" in content or is_generator_state(state):
            what = "It is a StyleGAN2 generator without an encoder: use it as the generator's weights."
        elif hint := import_hint(content):
            what = hint
        raise UserError(f"this is not a pSp checkpoint. {what}")
    opts = read_options(content)
    if reason := why_not_built(encoder_state, opts):
        raise UserError(
            f"this is a ReStyle checkpoint: {reason}. Import only its generator and average latent with `psp-weights "
            "import FILE out=...`."
        )
    encoder = infer_encoder(encoder_state, opts.get("encoder_type"))
    restyle = opts.get("encoder_type") in RESTYLE
    if restyle and "n_iters_per_batch" in opts:
        encoder["iterations"] = opts["n_iters_per_batch"]
    adapted = in_channels not in (None, encoder["in_channels"])
    if adapted and restyle:
        raise UserError(f"in_channels={in_channels} is not for ReStyle's encoders, which also take an image.")
    if adapted:
        encoder["in_channels"] = in_channels
    generator = infer_generator(decoder_state)
    average = latent_average(content)
    # ReStyle always starts from the average, regardless of the option
    start = restyle or bool(opts.get("start_from_latent_avg", average is not None))
    if start and average is None:
        raise UserError("it starts from the average latent but has no 'latent_avg'.")
    source = convert_source({} if adapted else opts, encoder["in_channels"], encoder["input_size"])
    if adapted and source["kind"] == "labels":  # the network never saw label maps, so no legacy resizing
        source["interpolation"] = "nearest"
    description = {
        "format": 1,
        "encoder": encoder,
        "generator": {"class": "Generator", **generator},
        "start_from_latent_avg": start,
        "source": source,
    }
    n_styles, style_dim = 2 * generator["output_size"].bit_length() - 4, generator["style_dim"]
    average = torch.zeros(n_styles, style_dim) if average is None else average
    whole = {f"encoder.{key}": value for key, value in encoder_state.items()}
    whole |= {f"generator.{key}": value for key, value in decoder_state.items()}
    whole["latent_avg"] = average.reshape(-1, style_dim).expand(n_styles, -1).to(torch.float32)
    return build_and_load(
        lambda: PSP.from_description(description),
        whole,
        "PSP",
        allow_missing=["generator.noises.*"],
        adapt=["encoder.input_layer.0.weight"] if adapted else [],
    )


def import_hint(content: Mapping[str, Any]) -> str:
    """Return a sentence about a generator that only psp-weights import finds in this checkpoint, or ""."""
    for part in (content, *(value for value in content.values() if isinstance(value, Mapping))):
        if any(str(key).endswith(("input.input", "mapping.fc0.weight")) for key in part):
            return (
                "It contains a generator under other names: convert it with `psp-weights import FILE "
                "out=generator.safetensors` and use that file."
            )
    return ""


def read_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training options of a released checkpoint; raise a UserError if they are not a dict or too large."""
    opts = content.get("opts", {})
    if not isinstance(opts, Mapping):
        raise UserError(f"its 'opts' are a {type(opts).__name__}, not a dict.")
    check_tree(opts, "opts")
    return dict(opts)


def latent_average(content: Mapping[str, Any]) -> Tensor | None:
    """Return `latent_avg` of a checkpoint, a tensor or a list; None if missing. Raise a UserError for anything else."""
    average = content.get("latent_avg")
    if average is None or isinstance(average, Tensor):
        return average
    what = f"its 'latent_avg' is a {type(average).__name__}, not a tensor"
    if not isinstance(average, list | tuple):
        raise UserError(f"{what}.")
    check_tree(average, "latent_avg")
    try:
        tensors = all(isinstance(row, Tensor) for row in average)
        return torch.stack(list(average)) if tensors else torch.tensor(average, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{what} or a list of numbers.") from None


def build_generator(state: State) -> Generator:
    """Build a generator from its tensors (published layout); noise maps, which early files lack, may be missing."""
    config = infer_generator(state)
    return build_and_load(lambda: Generator(**config), state, "the generator", ["noises.*"])


def generator_tensors(content: Mapping[str, Any]) -> State:
    """Return the generator's tensors in a released or converted checkpoint, without checking them."""
    state = tensors_of(content, "g_ema" if "g_ema" in content else "state_dict")
    return select(state, "decoder.") or select(state, "")

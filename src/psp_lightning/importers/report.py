"""The result of an import: the network, and how the file's tensors were used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from psp_lightning.checkpoints.strict import compare
from psp_lightning.checkpoints.weight_files import COMPUTED, save_generator, save_psp
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator

Row = tuple[str, int, str]  # part of the network, number of tensors, how they were used
CHANNEL_RULES = {32768: "config-f, multiplier 2", 16384: "config-e or auto, multiplier 1"}


@dataclass
class Imported:
    """An imported network.

    Attributes:
        source: what the file is, in a few words.
        net: the generator or the pSp network, in eval mode.
        latent_avg: (style_dim,) or (n_styles, style_dim), of a generator; None if it is computed when saving.
        average: origin of the average latent.
        rows: how the file's tensors were used.
        notes: sentences for the user.
        facts: JSON values for the description's `origin`.
    """

    source: str
    net: Generator | PSP
    latent_avg: Tensor | None = None
    average: str = COMPUTED
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of file that `save` writes, `psp` or `generator`."""
        return "psp" if isinstance(self.net, PSP) else "generator"

    @property
    def generator(self) -> Generator:
        """The generator: `net` itself, or the generator in a pSp network."""
        return self.net.generator if isinstance(self.net, PSP) else self.net  # type: ignore[return-value]

    def save(self, path: str | os.PathLike[str], origin: Mapping[str, Any] | None = None) -> None:
        """Write a self-describing file with `facts` and `origin`.

        Raises:
            OSError: the file cannot be written.
        """
        origin = {**self.facts, **(origin or {})}
        if isinstance(self.net, PSP):
            save_psp(path, self.net, origin)
        else:
            given = None if self.latent_avg is None else (self.latent_avg, self.average)
            save_generator(path, self.net, origin, latent_avg=given)

    def summary(self) -> list[tuple[str, str]]:
        """Return named lines that describe the network."""
        config = self.generator.config
        table = ", ".join(f"{side}: {width}" for side, width in channel_table(self.generator).items())
        lines = [
            ("file", self.source),
            (
                "generator",
                f"{config['output_size']} px, {config['image_channels']} image channels, mapping of "
                f"{config['n_mapping']} layers, z {config['z_dim']}, w {config['style_dim']}, "
                f"{self.generator.n_styles} styles",
            ),
            ("channels", f"{table} ({_channel_rule(config)})"),
            ("latent_avg", self.average),
        ]
        if isinstance(self.net, PSP):
            encoder: Any = self.net.encoder
            passes = f", {self.net.passes} passes" if self.net.passes else ""
            text = f"{type(encoder).__name__}, {encoder.in_channels} channels of {encoder.input_size} px{passes}"
            lines.insert(1, ("encoder", text))
            lines.append(("source", ", ".join(f"{k}: {v}" for k, v in self.net.source.items() if v) or "unknown"))
        if self.facts.get("activation_clamp") is not None:
            lines.append(("clamp", f"activations at +-{self.facts['activation_clamp']}"))
        return lines


def channel_table(generator: Generator) -> dict[int, int]:
    """Return the channels of a generator by resolution."""
    widths = {4: generator.input["input"].shape[1]}
    for i, to_rgb in enumerate(generator.to_rgbs):
        widths[8 << i] = to_rgb.conv.weight.shape[1]  # type: ignore[union-attr,index,assignment]
    return widths


def _channel_rule(config: Mapping[str, Any]) -> str:
    if "channels" in config:
        return "no rule"
    base = config["channel_base"] * config["channel_multiplier"]
    return f"{CHANNEL_RULES.get(base, f'base {base}')}, at most {config['max_channels']}"


def rows_of(
    net: nn.Module, state: Mapping[str, Any], allow_missing: Iterable[str] = (), adapt: Iterable[str] = ()
) -> list[Row]:
    """Return how each part of `net` uses the tensors of `state`; arguments are as in `load_strict`."""
    if isinstance(net, PSP) and not any(key.startswith("generator.") for key in state):
        allow_missing = [*allow_missing, "generator.*"]  # the file refers to the shipped generator
    report = compare(net, state, allow_missing, adapt=adapt)
    rows: Counter[tuple[str, str]] = Counter()
    for part, count, result in report.rows(depth=2):
        top, _, second = part.partition(".")
        name = part if top in ("encoder", "generator") and second else top
        left = result.startswith("left")
        if name == "latent_avg" and left:
            result = "matched"  # the file has it outside the state dict
        elif name in ("noises", "generator.noises") and left:
            result = "drawn: not in the file"
        elif result == "adapted":
            result = "adapted: its input channels"
        rows[name, result] += count
    return [(name, count, result) for (name, result), count in rows.items()]


def unused_rows(content: Mapping[str, Any], used: str = "state_dict") -> list[Row]:
    """Return rows for the other dicts in a training checkpoint besides the state dict `used`."""
    skip = {used, "latent_avg", "opts", "psp"}
    return [
        (str(key)[:40], len(value), "not used: not weights of the network")
        for key, value in content.items()
        if key not in skip and isinstance(value, Mapping) and value
    ]

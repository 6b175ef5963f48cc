"""Images with known codes, drawn by the frozen generator of a training, one for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.models.protocols import Generator
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.arguments import choice, number
from psp_lightning.utils.errors import UserError


@dataclass(frozen=True)
class Drawing:
    """How images and their codes are drawn from seeds.

    The random numbers of a sample depend only on its seed, and not on the batch or the number of ranks. Its codes are
    the same on all devices. Its noise is drawn on the device, for speed, so different kinds of devices draw different
    noise.

    Attributes:
        truncation: truncation of the codes, from 0 to 1; 1 draws from all of W, smaller values draw closer to the
            average latent.
        mixing: probability from 0 to 1 that the styles from a random layer onwards come from a second code (style
            mixing, StyleGAN, arXiv:1812.04948, section 3.1).
        noise: noise of the generator: `const` for its stored maps, `random` for new ones in each sample.

    Raises:
        ArgumentError: a value is out of range.
    """

    truncation: float = 1.0
    mixing: float = 0.5
    noise: str = "random"

    def __post_init__(self) -> None:
        number("truncation", self.truncation, 0, 1)
        number("mixing", self.mixing, 0, 1)
        choice("noise", self.noise, ("random", "const"))

    @torch.no_grad()
    def __call__(self, generator: Generator, latent_avg: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw one sample for each seed.

        Args:
            generator: the generator.
            latent_avg: average latent (n_styles, style_dim), towards which the codes are truncated.
            seeds: seeds of g samples, each from 0 to 2 ** 63 - 1.

        Returns:
            Images (g, 3, output_size, output_size) clamped to [-1, 1], and codes (g, n_styles, style_dim), both
            float32 on the device of `latent_avg`.

        Raises:
            UserError: the generator has no noise maps that can be drawn.
        """
        layers, device = generator.n_styles, latent_avg.device
        noise = self._noise(generator, seeds, device)
        z, first = [], []
        for seed in seeds:
            source = torch.Generator().manual_seed(seed)
            z.append(torch.randn(2, generator.z_dim, generator=source))
            mixes = torch.rand((), generator=source) < self.mixing
            first.append(torch.where(mixes, torch.randint(1, layers, (), generator=source), layers))
        w = generator.mapping(torch.cat(z).to(device)).float().view(len(z), 2, -1)
        second = torch.arange(layers)[:, None] >= torch.stack(first)[:, None, None]  # (g, n_styles, 1)
        codes = torch.where(second.to(device), w[:, 1:], w[:, :1])
        codes = latent_avg + self.truncation * (codes - latent_avg)
        return generator.synthesis(codes, noise).float().clamp(-1, 1), codes

    def _noise(self, generator: Generator, seeds: Sequence[int], device: torch.device) -> Noise:
        """Return noise maps (g, 1, r, r) for each layer, or `const`."""
        if self.noise == "const":
            return "const"
        sides = noise_sides(generator, "data.noise")
        # a different seed than for the codes, so that their random numbers do not appear in the maps
        sources = [torch.Generator(device).manual_seed(seed ^ (1 << 31)) for seed in seeds]
        return [
            torch.stack([torch.randn(1, side, side, generator=source, device=device) for source in sources])
            for side in sides
        ]


def noise_sides(generator: Generator, setting: str) -> list[int]:
    """Return the sides of the generator's noise maps.

    Raises:
        UserError: the generator does not tell them; the message names `setting`.
    """
    if not hasattr(generator, "noise_sides"):
        name = type(generator).__name__
        raise UserError(f"{setting}=random: {name} has no noise_sides(), which says what to draw. Use {setting}=const.")
    return list(generator.noise_sides())


def with_drawn(batch: dict[str, Any], drawing: Drawing, generator: Generator, latent_avg: Tensor) -> dict[str, Any]:
    """Return a batch of `GeneratedSamples` in which images take the place of its g seeds.

    The images are appended to `source` and `target`, pooled to the size of each, so both contain all B samples. `codes`
    (B, n_styles, style_dim) contains the codes of the generated images, and 0 for the other samples. `generated` (B,)
    is float32: 1 for generated images, 0 for the other samples.
    """
    full = dict(batch)
    seeds, n_images = full.pop("seeds"), len(batch["target"])
    if not len(seeds):
        return full
    images, codes = drawing(generator, latent_avg, seeds)
    for key in ("source", "target"):
        full[key] = torch.cat([batch[key], F.adaptive_avg_pool2d(images, batch[key].shape[-2:])])
    full["codes"] = torch.cat([codes.new_zeros(n_images, *codes.shape[1:]), codes])
    full["generated"] = torch.cat([codes.new_zeros(n_images), codes.new_ones(len(seeds))])
    return full

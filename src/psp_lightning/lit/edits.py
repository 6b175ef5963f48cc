"""Pairs of a generated image and its edited form, which teach a refiner to keep edits.

The codes of a generated image are known, so its edited form can be drawn. Idea: StyleFeatureEditor (arXiv:2406.10601),
section 3.3, which trains on edits of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psp_lightning.models.protocols import Generator
from psp_lightning.models.stylegan2 import Noise

PSI = 0.7  # truncation of the drawn codes


@dataclass(frozen=True)
class Edit:
    """A change of codes: some styles are replaced, then a direction is added.

    Attributes:
        replaced: bool (B, n_styles, 1), true where a style is replaced.
        styles: new styles (B, n_styles, style_dim).
        direction: change (B, n_styles, style_dim) that is added.
    """

    replaced: Tensor
    styles: Tensor
    direction: Tensor

    def __call__(self, w_plus: Tensor) -> Tensor:
        """Return the edited codes (B, n_styles, style_dim)."""
        return torch.where(self.replaced, self.styles, w_plus) + self.direction


@torch.no_grad()
def draw_edits(generator: Generator, latent_avg: Tensor, n: int, noise: Noise = "const") -> tuple[Tensor, Tensor, Edit]:
    """Draw images, edits of their codes, and the edited images. The random numbers come from the global state.

    About half of the edits replace all styles from a random layer in the finer half onwards; the others add the
    difference of two codes, multiplied by a random factor from 0.1 to 0.5.

    Args:
        generator: the generator.
        latent_avg: average latent (n_styles, style_dim), towards which the drawn codes are truncated.
        n: number of pairs.
        noise: see `Generator.synthesis`; both images of a pair get the same if it is not "random".

    Returns:
        Images and edited images, both (n, 3, output_size, output_size) clamped to [-1, 1], and the edit.
    """
    layers = generator.n_styles
    z = torch.randn(3 * n, generator.z_dim, device=latent_avg.device)
    codes = latent_avg + PSI * (generator.mapping(z)[:, None] - latent_avg)
    w_plus, other, third = codes.chunk(3)
    first = torch.randint(layers // 2 - 1, layers, (n, 1, 1), device=z.device)
    adds = torch.rand(n, 1, 1, device=z.device) < 0.5
    replaced = (torch.arange(layers, device=z.device)[:, None] >= first) & ~adds
    strength = 0.1 + 0.4 * torch.rand(n, 1, 1, device=z.device)
    edit = Edit(replaced, other, torch.where(adds, strength * (other - third), 0.0))
    images, edited = (generator.synthesis(w, noise).clamp(-1, 1) for w in (w_plus, edit(w_plus)))
    return images, edited, edit

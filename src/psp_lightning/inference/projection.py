"""Projection into W+ from the average latent, in one call; `optimize.py` contains the method and its options."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.inference.optimize import Distance, Optimizer
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.protocols import GeneratorModule


def project(
    generator: GeneratorModule,
    images: Tensor,
    latent_avg: Tensor,
    distance: Distance,
    steps: int = 500,
    lr: float = 0.1,
) -> Tensor:
    """Optimise codes (B, n_styles, style_dim) until their images are close to `images`, and return them detached.

    Args:
        generator: generator, used with constant noise; it is not changed. `freeze_generator` makes it faster.
        images: images (B, C, S, S) in [-1, 1], on the generator's device.
        latent_avg: initial codes, (style_dim,) or (n_styles, style_dim).
        distance: function that maps (y_hat, y), both (B, C, S, S), to (B,); each image is optimised independently.
        steps: number of Adam steps.
        lr: highest learning rate; it rises over the first 5 % of the steps and falls to zero over the last 25 %.
    """
    start = latent_avg.detach().expand(generator.n_styles, -1)[None].expand(len(images), -1, -1)
    return Optimizer(distance, steps=steps, lr=lr).run(generator, images, Inversion(start)).w_plus

"""Projection into W+: find the codes of images by optimisation, a slow alternative to an encoder.

Source: Abdal et al., Image2StyleGAN (arXiv:1904.03189), with the learning-rate schedule of StyleGAN2
(arXiv:1912.04958), appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from psp_lightning.models.stylegan2 import Generator


def project(
    generator: Generator,
    images: Tensor,
    latent_avg: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    steps: int = 500,
    lr: float = 0.1,
) -> Tensor:
    """Optimise codes (B, n_styles, style_dim) until their images are close to `images`, and return them detached.

    Args:
        generator: the generator, used with constant noise; it is not changed. `freeze_generator` makes it faster.
        images: (B, C, S, S) in [-1, 1], on the generator's device.
        latent_avg: (style_dim,) or (n_styles, style_dim), the initial codes.
        distance: maps (y_hat, y), both (B, C, S, S), to (B,); each image is optimised independently.
        steps: number of Adam steps.
        lr: highest learning rate; it rises over the first 5 % of the steps and falls to zero over the last 25 %.
    """
    start = latent_avg.detach().expand(generator.n_styles, -1)
    w_plus = start[None].repeat(len(images), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([w_plus], lr=lr, betas=(0.9, 0.999))
    for step in range(steps):
        t = step / steps
        fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
        optimizer.param_groups[0]["lr"] = lr * fall * min(1.0, (t + 1 / steps) / 0.05)
        loss = distance(generator.synthesis(w_plus), images).sum()
        (w_plus.grad,) = torch.autograd.grad(loss, w_plus)  # computes no gradients of the weights
        optimizer.step()
    return w_plus.detach()

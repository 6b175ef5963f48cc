"""Projection into W+: the codes of given images by optimisation, the slow counterpart of an encoder.

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
    """Codes whose images come near to `images`.

    Args:
        generator: its weights get no gradients; noise is constant.
        images: (B, C, S, S) in [-1, 1], on the generator's device.
        latent_avg: (style_dim,) or (n_styles, style_dim), where every search starts.
        distance: (y_hat, y), both (B, C, S, S), to (B,); each image is its own problem.
        steps: of Adam.
        lr: highest learning rate; it rises over the first 5 % of the steps and falls to zero over the last 25 %.

    Returns:
        (B, n_styles, style_dim), detached.
    """
    start = latent_avg.detach().expand(generator.n_styles, -1)
    w_plus = start[None].repeat(len(images), 1, 1).requires_grad_()
    required = [p.requires_grad for p in generator.parameters()]
    generator.requires_grad_(False)
    optimizer = torch.optim.Adam([w_plus], lr=lr, betas=(0.9, 0.999))
    try:
        for step in range(steps):
            t = step / steps
            fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
            optimizer.param_groups[0]["lr"] = lr * fall * min(1.0, (t + 1 / steps) / 0.05)
            loss = distance(generator.synthesis(w_plus), images).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for p, value in zip(generator.parameters(), required, strict=True):
            p.requires_grad_(value)
    return w_plus.detach()

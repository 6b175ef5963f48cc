"""Training of an encoder that makes several passes, with a loss for each pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psp_lightning.models.psp import PSP


def detached_passes(net: PSP, source: Tensor, learn: Callable[[Tensor], Tensor]) -> Tensor:
    """Call `learn` for each pass except the last, and return the codes of the last pass, (B, n_styles, style_dim).

    No gradient flows from one pass into another. A pass receives the image that the loss of the previous pass compared;
    the first pass receives the image of the average latent.

    Args:
        net: its encoder is a `RefiningEncoder`.
        source: (B, C, input_size, input_size).
        learn: makes the backward pass of the loss of a pass. It receives the codes relative to the average latent and
            returns their images (B, 3, output_size, output_size).

    Source: Alaluf et al., ReStyle (arXiv:2104.02699), as trained by its code, commit 5e80276.
    """
    delta = torch.zeros_like(net.latent_avg)[None]  # (1, n_styles, style_dim)
    with torch.no_grad():
        image = net.decode(delta + net.latent_avg if net.start_from_latent_avg else delta)
    for _ in range(net.passes - 1):
        delta = delta.detach() + net.encoder(source, image)  # type: ignore[call-arg]
        image = learn(delta).detach()
    return delta.detach() + net.encoder(source, image)  # type: ignore[call-arg]

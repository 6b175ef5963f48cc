"""Training of an encoder that makes several passes, with a loss for each pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psp_lightning.models.psp import PSP


def detached_passes(net: PSP, source: Tensor, learn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the codes of the last pass, (B, n_styles, style_dim), after `learn` has been called for the passes before.

    No gradient flows from one pass into another. The image that a pass receives is the one that the loss of the pass
    before has compared.

    Args:
        net: its encoder is a `RefiningEncoder`.
        source: (B, C, input_size, input_size).
        learn: maps the codes of a pass, relative to the average latent, to their images (B, 3, output_size,
            output_size). It makes the backward pass of their loss.

    Source: Alaluf et al., ReStyle (arXiv:2104.02699), and the training of its code, commit 5e80276.
    """
    delta = torch.zeros_like(net.latent_avg)[None]  # (1, n_styles, style_dim)
    with torch.no_grad():
        image = net.decode(delta + net.latent_avg if net.start_from_latent_avg else delta)
    for _ in range(net.passes - 1):
        delta = delta.detach() + net.encoder(source, image)  # type: ignore[call-arg]
        image = learn(delta).detach()
    return delta.detach() + net.encoder(source, image)  # type: ignore[call-arg]

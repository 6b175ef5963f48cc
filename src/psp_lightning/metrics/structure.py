"""Structural similarity of images, computed by torchmetrics in float64 where the device supports it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from psp_lightning.metrics.images import ImageMean
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.errors import UserError

WINDOW = 11  # pixels, of the Gaussian window with sigma 1.5
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales in the paper


def _unit(image: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1]: structural similarity changes if a constant is added to both images."""
    return (image if image.device.type == "mps" else image.double()) / 2 + 0.5


@register_metric("ssim")
class SSIM(ImageMean):
    """Mean structural similarity of outputs clamped to [-1, 1], at most 1; higher is better.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """

    higher_is_better = True
    convention = "RGB in [0, 1], Gaussian window of 11 px with sigma 1.5, K1 0.01, K2 0.03 (torchmetrics)"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        if min(y.shape[-2:]) < WINDOW:
            raise UserError(f"ssim needs images of at least {WINDOW} px, not {y.shape[-1]} x {y.shape[-2]}.")
        values = structural_similarity_index_measure(_unit(y_hat), _unit(y), data_range=1.0, reduction="none")
        assert isinstance(values, Tensor)
        return values


@register_metric("ms_ssim")
class MultiScaleSSIM(ImageMean):
    """Mean multi-scale structural similarity of outputs clamped to [-1, 1], at most 1; higher is better.

    Images of 176 px and more have the five scales of the paper. Smaller ones have as many as the window fits into, with
    the first weights of the paper divided by their sum.

    Source: Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003.
    """

    higher_is_better = True
    convention = (
        "as ssim at 5 scales from 176 px on; at smaller sizes fewer scales (99 px: 4, 44 px: 3), whose weights are "
        "divided by their sum (torchmetrics, negative similarities as 0)"
    )

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        size = min(y.shape[-2:])
        scales = next((n for n in range(5, 1, -1) if size // (n - 1) ** 2 >= WINDOW), 0)
        if not scales:
            raise UserError(f"ms_ssim needs images of at least {WINDOW} px, not {y.shape[-1]} x {y.shape[-2]}.")
        betas = tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])
        values = multiscale_structural_similarity_index_measure(
            _unit(y_hat), _unit(y), data_range=1.0, betas=betas, normalize="relu", reduction="none"
        )
        return torch.as_tensor(values)

"""Structural similarity of images: torchmetrics' maps, in float64 where the device supports it.

The mean is over the pixels at which the window lies inside the image, as in the papers and in scikit-image. Some
versions of torchmetrics include the padded border in the means that they return themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from psp_lightning.metrics.images import ImageMean
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.errors import UserError

WINDOW = 11  # pixels, of the Gaussian window with sigma 1.5
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales in the paper


def _unit(image: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1]: structural similarity changes if a constant is added to both images."""
    return (image if image.device.type == "mps" else image.double()) / 2 + 0.5


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (B,) of images (B, 3, H, W) in [0, 1]."""
    found = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    edge = WINDOW // 2
    return found[1][..., edge:-edge, edge:-edge].flatten(1).mean(1)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """Return the part of the similarity without the means, (B,), of images (B, 3, H, W) in [0, 1]."""
    found = structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", return_contrast_sensitivity=True
    )
    return found[1]


@register_metric("ssim")
class SSIM(ImageMean):
    """Mean structural similarity of outputs clamped to [-1, 1], at most 1; higher is better.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """

    higher_is_better = True
    convention = "RGB in [0, 1], Gaussian window of 11 px with sigma 1.5 inside the image, K1 0.01, K2 0.03"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        if min(y.shape[-2:]) < WINDOW:
            raise UserError(f"SSIM needs images of at least {WINDOW} px, not {y.shape[-1]} x {y.shape[-2]}.")
        return ssim(_unit(y_hat), _unit(y))


@register_metric("ms_ssim")
class MultiScaleSSIM(ImageMean):
    """Mean multi-scale structural similarity of outputs clamped to [-1, 1], at most 1; higher is better.

    Images of 176 px and more have the five scales of the paper. Smaller images have as many scales as the window fits
    into; their weights are the paper's first ones, divided by their sum.

    Source: Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003.
    """

    higher_is_better = True
    convention = (
        "as ssim at 5 scales from 176 px on; smaller images have fewer (88 px: 4, 44 px: 3), whose weights are divided "
        "by their sum; negative values of a scale count as 0"
    )

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        size = min(y.shape[-2:])
        n = next((n for n in range(len(BETAS), 0, -1) if size >> (n - 1) >= WINDOW), 0)
        if not n:
            raise UserError(f"MS-SSIM needs images of at least {WINDOW} px, not {y.shape[-1]} x {y.shape[-2]}.")
        a, b = _unit(y_hat), _unit(y)
        value = torch.ones(len(y), dtype=a.dtype, device=a.device)
        for scale, beta in enumerate(BETAS[:n]):
            measure = ssim if scale == n - 1 else contrast
            value = value * measure(a, b).clamp_min(0) ** (beta / sum(BETAS[:n]))
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return value

"""Metrics per image that compare an output with its source, or with other outputs for the same source."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.data.transforms import lowres
from psp_lightning.metrics.images import ImageMean, psnr_per_image
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import to_pil


@register_metric("consistency")
class Consistency(ImageMean):
    """PSNR between the output, reduced as the source was, and the source (superres); higher is better."""

    higher_is_better = True
    unit = "dB"
    needs = ("source", "factor")
    convention = "PSNR of the output as 8 bits, down-sampled like the source, against the source; peak as for psnr"

    def per_image(self, y_hat: Tensor, y: Tensor, source: Tensor, factor: Tensor) -> Tensor:
        size, factors = source.shape[-1], factor.flatten().tolist()
        reduced = [lowres(to_pil(image), size, n) for image, n in zip(y_hat, factors, strict=True)]
        return psnr_per_image(torch.stack(reduced).to(source), source)


class _Region(ImageMean):
    """Squared error in one part of the images; images without it have no value (NaN)."""

    higher_is_better = False
    needs = ("source",)
    inside: bool

    def reason(self, y_hat: Tensor, y: Tensor, **needed: Any) -> str:
        return "no hole" if self.inside else "nothing but a hole"

    def per_image(self, y_hat: Tensor, y: Tensor, source: Tensor) -> Tensor:
        if source.shape[1] != 4:
            raise UserError("it needs sources with a hole (task inpainting).")
        hole = F.interpolate(source[:, 3:], size=y.shape[-2:], mode="nearest")
        weight = (hole if self.inside else 1 - hole).expand_as(y)
        return ((y_hat - y).square() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


@register_metric("mse_hole")
class HoleMSE(_Region):
    """Mean squared error inside the hole (inpainting); lower is better."""

    convention = "RGB in [-1, 1], pixels inside the hole"
    inside = True


@register_metric("mse_known")
class KnownMSE(_Region):
    """Mean squared error outside the hole (inpainting); lower is better."""

    convention = "RGB in [-1, 1], pixels outside the hole"
    inside = False


@register_metric("diversity")
class Diversity(ImageMean):
    """Mean absolute difference between the outputs for one source, over all pairs; higher is more diverse."""

    higher_is_better = True
    needs = ("outputs",)
    convention = "mean absolute difference of RGB in [-1, 1] over all pairs of outputs for one source"

    def per_image(self, y_hat: Tensor, y: Tensor, outputs: Tensor) -> Tensor:
        n = outputs.shape[1]
        if n < 2:
            raise UserError("it needs several outputs for each source: set mix.latent_mask and mix.n_outputs.")
        pairs = [absolute_difference(outputs[:, i], outputs[:, j]) for i in range(n) for j in range(i)]
        return torch.stack(pairs).mean(0)


def absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference (B,) of two images (B, 3, H, W)."""
    return (a - b).abs().flatten(1).mean(1)

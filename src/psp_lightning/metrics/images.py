"""Image metrics: a mean over images, exact whatever the batch sizes and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.errors import UserError


class ImageMean(Metric):
    """Mean of one number per image.

    Sum and count are kept and reduced separately, so a short last batch or a rank with fewer images weighs by its
    images. `update` is left to the subclasses.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float32 and not float64, which mps lacks.
        self.add_state("total", default=torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        values = values.detach().float().flatten()
        self.total += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """float32 scalar; NaN before the first image."""
        return self.total / self.count


@register_metric("mse")
class MSE(ImageMean):
    """Mean squared error, output clamped to [-1, 1]; lower is better."""

    higher_is_better = False

    def update(self, y_hat: Tensor, y: Tensor) -> None:
        """Add images.

        Args:
            y_hat: (B, C, H, W) float, clamped here.
            y: (B, C, H, W) float in [-1, 1].
        """
        self._add(mse_per_image(y_hat.float().clamp(-1, 1), y.float()))


@register_metric("psnr")
class PSNR(ImageMean):
    """Peak signal-to-noise ratio in dB, per image, then averaged; output clamped to [-1, 1]; higher is better.

    The peak is 2, the width of [-1, 1]. Identical images count as 106 dB (squared error 1e-10).
    """

    higher_is_better = True

    def update(self, y_hat: Tensor, y: Tensor) -> None:
        """Add images; arguments as for `MSE`."""
        mse = mse_per_image(y_hat.float().clamp(-1, 1), y.float())
        self._add(10 * torch.log10(4 / mse.clamp_min(1e-10)))


@register_metric("id_similarity")
class IdSimilarity(ImageMean):
    """Mean cosine similarity of the identity embeddings of output and target, in [-1, 1]; higher is better.

    Args:
        similarity: from two image batches (B, 3, H, W) to (B,), e.g. `IDLoss.similarity`. A function and not a
            module, so that the network is neither copied nor saved twice. None where `update` gets similarities.
    """

    higher_is_better = True

    def __init__(self, similarity: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.similarity = similarity

    def update(self, y_hat: Tensor, y: Tensor | None = None) -> None:
        """Add images, or with one argument similarities (B,) that exist already.

        Args:
            y_hat: (B, 3, H, W) float, clamped here; or (B,) similarities.
            y: (B, 3, H, W) float in [-1, 1].
        """
        if y is None:
            self._add(y_hat)
            return
        if self.similarity is None:
            raise UserError("IdSimilarity was built without a network: give it `similarity`, or pass similarities.")
        with torch.no_grad():
            self._add(self.similarity(y_hat.clamp(-1, 1), y))

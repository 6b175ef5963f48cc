"""Metrics that average over images, exactly for any batch sizes and number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.errors import UserError


def psnr_per_image(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB (B,) of images in [-1, 1]; 106 dB for equal images."""
    return 10 * torch.log10(4 / mse_per_image(y_hat, y).clamp_min(1e-10))


class ImageMean(Metric):
    """A base class for the mean of one number per image.

    Subclasses implement `per_image(y_hat, y)`, which maps outputs and targets (B, 3, H, W) float in [-1, 1] to (B,).
    Images without a value are NaN there; `reason`, with the same arguments for one image, then says why.

    It keeps and reduces the sum and the count separately, so each image has the same weight, even in a short last batch
    or on a rank with fewer images.

    Attributes:
        unit: unit of the values, for tables.
        convention: what a reader must know to compare the values with others: ranges, constants, networks.
        needs: keys of a batch that `update` and `per_image` receive as further arguments, such as `source`.
    """

    full_state_update = False
    is_differentiable = False
    unit: ClassVar[str] = ""
    convention: str = ""
    needs: ClassVar[tuple[str, ...]] = ()
    per_image: Callable[..., Tensor]
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # mps does not support float64
        self.add_state("total", default=torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor, **needed: Any) -> None:
        """Add outputs `y_hat` (clamped here) and targets `y` in [-1, 1], both (B, 3, H, W) float."""
        self._add(self.per_image(y_hat.float().clamp(-1, 1), y.float(), **needed))

    def _add(self, values: Tensor) -> None:
        values = values.detach().float().flatten()
        self.total += values.sum()
        self.count += values.numel()

    def reason(self, y_hat: Tensor, y: Tensor, **needed: Any) -> str:
        """Return why an image (1, 3, H, W) has no value."""
        return "no value"

    def compute(self) -> Tensor:
        """Return the mean as a float32 scalar; NaN before the first image."""
        return self.total / self.count


@register_metric("mse")
class MSE(ImageMean):
    """Mean squared error of outputs clamped to [-1, 1]; lower is better."""

    higher_is_better = False
    convention = "RGB in [-1, 1]"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return mse_per_image(y_hat, y)


@register_metric("psnr")
class PSNR(ImageMean):
    """Peak signal-to-noise ratio of outputs clamped to [-1, 1], in dB, averaged over images; higher is better.

    The peak is 2, the width of [-1, 1]. Identical images count as 106 dB (squared error 1e-10).
    """

    higher_is_better = True
    unit = "dB"
    convention = "peak 2 for RGB in [-1, 1], the same as 255 for 8 bits; mean over images; equal images count as 106 dB"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return psnr_per_image(y_hat, y)


@register_metric("id_similarity")
class IdSimilarity(ImageMean):
    """Mean cosine similarity of the identity embeddings of output and target, in [-1, 1]; higher is better.

    Args:
        similarity: maps two image batches (B, 3, H, W) to (B,), for example `IDLoss.similarity`. It is a function and
            not a module, so the network is not copied or saved twice. None if `update` receives similarities.
    """

    higher_is_better = True
    convention = "cosine of the embeddings"

    def __init__(self, similarity: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.similarity = similarity

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        if self.similarity is None:
            raise UserError("IdSimilarity needs `similarity` to compare images; without it, pass similarities.")
        return self.similarity(y_hat, y)

    def update(self, y_hat: Tensor, y: Tensor | None = None) -> None:  # type: ignore[override]
        """Add outputs (clamped here) and targets in [-1, 1], float (B, 3, H, W); without `y`, add similarities (B,).

        Raises:
            UserError: `y` is given and the metric has no `similarity`.
        """
        if y is None:
            self._add(y_hat)
        else:
            super().update(y_hat, y)

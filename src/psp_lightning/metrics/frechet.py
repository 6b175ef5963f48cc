"""Frechet distance between two sets of feature vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from psp_lightning.utils.errors import UserError


class FrechetDistance(Metric):
    """Distance of two Gaussians fitted to the features of two sets of images; lower is better.

    Not comparable with published FID, whose features are Inception's: only with distances in the same features.

    Args:
        features: images (B, 3, H, W) in [-1, 1] to (B, D), e.g. `ToyFaceEmbedding.statistics`. A function and not a
            module, so that the network is not saved with the metric.

    Source: Heusel et al. (arXiv:1706.08500), equation 6.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, features: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features
        for name in ("real", "fake"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add images (B, 3, H, W), clamped to [-1, 1] here, to one of the two sets."""
        (self.real if real else self.fake).append(self.features(images.clamp(-1, 1)).float())  # type: ignore[union-attr, operator]

    def compute(self) -> Tensor:
        """float64 scalar.

        Raises:
            UserError: a set with fewer than two images.
        """
        means, covariances = [], []
        for name in ("real", "fake"):
            parts = getattr(self, name)
            values = (torch.cat(parts) if isinstance(parts, list) and parts else torch.empty(0, 0)).double().cpu()
            if len(values) < 2:
                raise UserError(f"FrechetDistance needs at least two {name} images, got {len(values)}.")
            means.append(values.mean(0))
            covariances.append(values.t().cov())
        return frechet(means[0], covariances[0], means[1], covariances[1])


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians: means (D,), covariances (D, D), float64.

    The trace of `(A B)^(1/2)` is the sum of the roots of the eigenvalues of `A^(1/2) B A^(1/2)`, which is symmetric.
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    mixed = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * mixed

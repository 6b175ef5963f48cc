"""Frechet distance between the features of two sets of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from psp_lightning.utils.errors import UserError

SETS = ("real", "fake")


class FrechetDistance(Metric):
    """Distance between two Gaussians fitted to the features of two sets of images; lower is better.

    Compare values only if they use the same features; published FID uses Inception's. Memory does not grow with the
    number of images. Batch sizes and ranks change the result only by rounding in float64; a rank may have no images.
    The sums are float64, which mps does not support.

    Args:
        features: maps images (B, 3, H, W) in [-1, 1] to (B, size). A network is not part of the state dict, and
            `metric.to(device)` does not move it: move the network yourself.
        size: number of features.

    Source: Heusel et al. (arXiv:1706.08500), equation 6.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    features: Callable[[Tensor], Tensor]

    def __init__(self, features: Callable[[Tensor], Tensor], size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.__dict__["features"] = features  # not registered, because a network would be saved with the metric
        for name in SETS:
            self.add_state(f"{name}_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
            self.add_state(f"{name}_sum", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{name}_products", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Clamp images (B, 3, H, W) to [-1, 1] and add them to the real or the fake set."""
        name = SETS[0] if real else SETS[1]
        values = self.features(images.clamp(-1, 1)).double()
        setattr(self, f"{name}_count", getattr(self, f"{name}_count") + len(values))
        setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + values.sum(0))
        setattr(self, f"{name}_products", getattr(self, f"{name}_products") + values.t() @ values)

    def compute(self) -> Tensor:
        """Return the distance as a float64 scalar.

        Raises:
            UserError: a set has fewer than two images.
        """
        moments = []
        for name in SETS:
            count, total = int(getattr(self, f"{name}_count")), getattr(self, f"{name}_sum")
            if count < 2:
                raise UserError(f"a Frechet distance needs at least two {name} images, got {count}.")
            mean = total / count
            moments += [mean, (getattr(self, f"{name}_products") - count * torch.outer(mean, mean)) / (count - 1)]
        return frechet(*moments)


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Return the squared 2-Wasserstein distance of two Gaussians with means (D,) and covariances (D, D), float64.

    The trace of `(A B)^(1/2)` is the sum of the square roots of the eigenvalues of the symmetric `A^(1/2) B A^(1/2)`.
    Eigenvalues that are zero except for rounding, which occur if there are fewer images than features, count as zero,
    because the square roots of their rounding errors would add up.
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * _without_rounding(values).sqrt()) @ vectors.t()
    mixed = _without_rounding(torch.linalg.eigvalsh(root @ covariance_b @ root)).sqrt().sum()
    return (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * mixed


def _without_rounding(eigenvalues: Tensor) -> Tensor:
    """Return ascending eigenvalues; set those below the rounding error of the largest to zero."""
    limit = eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > limit, eigenvalues, 0.0)

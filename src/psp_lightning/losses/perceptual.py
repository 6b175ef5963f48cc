"""Perceptual distance in the features of the library's own embedding, for domains without ImageNet weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.loading import load_embedding
from psp_lightning.losses.base import LossInputs, LossTerm, full_precision, register_loss
from psp_lightning.models.layers import freeze


@register_loss("perceptual")
class PerceptualLoss(LossTerm):
    """Squared distance of unit-length feature vectors, mean over positions, sum over stages, mean over the batch.

    Args:
        weights: file of an embedding, or its name, as `toyfaces/identity`.

    Raises:
        UserError: the file is missing, unreadable or of another kind.

    Source: LPIPS (arXiv:1801.03924), equation 1, with all channel weights one and this library's features.
    """

    def __init__(self, weights: str = "toyfaces/identity") -> None:
        super().__init__()
        self.network = freeze(load_embedding(weights))

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the perceptual distance of pairs.

        Args:
            y_hat: (B, 3, H, W) float, nominally [-1, 1]; gradients flow into it.
            y: (B, 3, H, W) float in [-1, 1]; its features are computed without a graph.

        Returns:
            (B,) float32, from 0 to 4 for each stage.
        """
        with full_precision(y_hat.device):
            with torch.no_grad():
                target = self._features(y.float())
            output = self._features(y_hat.float())
            stages = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(output, target, strict=True)]
            return torch.stack(stages).sum(0)

    def _features(self, image: Tensor) -> list[Tensor]:
        return [F.normalize(stage, dim=1, eps=1e-10) for stage in self.network.features(image)]

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(inputs.y_hat, inputs.y).mean()

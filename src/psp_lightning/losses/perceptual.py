"""Perceptual distance in the features of an embedding of this library, for use without ImageNet weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from psp_lightning.loading import load_embedding
from psp_lightning.losses.base import register_loss
from psp_lightning.losses.similarity import FeatureLoss
from psp_lightning.models.layers import freeze


@register_loss("perceptual")
class PerceptualLoss(FeatureLoss):
    """Squared distance of unit feature vectors: averaged over positions, summed over stages, averaged over the batch.

    The distance is from 0 to 4 for each stage.

    Args:
        weights: file or name of an embedding, such as `toyfaces/identity`.

    Raises:
        UserError: the file is missing, unreadable or of another kind.

    Source: LPIPS (arXiv:1801.03924), equation 1, with all channel weights one and this library's features.
    """

    def __init__(self, weights: str = "toyfaces/identity") -> None:
        super().__init__()
        self.network = freeze(load_embedding(weights))
        self.convention = f"squared distance of the unit features of {weights}, not LPIPS"

    def features(self, image: Tensor) -> list[Tensor]:
        return [F.normalize(stage, dim=1, eps=1e-10) for stage in self.network.features(image)]

    def layer_distances(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]

"""Base class of the losses that compare embeddings of a frozen network."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, TermOutput, full_precision


class SimilarityLoss(LossTerm):
    """1 - cos(embedding(y_hat), embedding(y)), mean over the batch.

    Logs `<name>_similarity` = mean cos(y_hat, y) and, where the source is an RGB image, `<name>_improvement` =
    mean(cos(y_hat, y) - cos(y, x)). Target and source are embedded without a graph, and once where they are the
    same object.
    """

    @abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) float32, nominally [-1, 1], to unit vectors (B, D)."""

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the cosine of the two images' embeddings, in [-1, 1].

        Args:
            a: (B, 3, H, W) float, nominally [-1, 1].
            b: (B, 3, H, W) float, nominally [-1, 1].

        Returns:
            (B,) float32.
        """
        with full_precision(a.device):
            return cosine(self.embed(a.float()), self.embed(b.float()))

    def forward(self, inputs: LossInputs) -> TermOutput:
        x, y = inputs.x, inputs.y
        with torch.no_grad():
            target = self.embed(y)  # (B, D)
            source = None
            if x is not None and x.shape[1] == 3:  # a sketch or a label map cannot be embedded
                source = target if x is y else self.embed(x)
        similarity = cosine(self.embed(inputs.y_hat), target)  # (B,)
        logs = {f"{self.name}_similarity": similarity.detach().mean()}
        if source is not None:
            logs[f"{self.name}_improvement"] = (similarity.detach() - cosine(target, source)).mean()
        return TermOutput((1 - similarity).mean(), logs)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products (B,) of unit vectors (B, D) and (B, D)."""
    return (a * b).sum(dim=1)

"""Base classes of the losses that compare embeddings or features of a frozen network."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, TermOutput, full_precision


class SimilarityLoss(LossTerm):
    """1 - cos(embedding(y_hat), embedding(y)), averaged over the batch.

    It logs `<name>_similarity` = mean cos(y_hat, y) and, if the source is an RGB image, `<name>_improvement` =
    mean(cos(y_hat, y) - cos(y, x)). Target and source are embedded without a graph; if they are one object, it is
    embedded only once.
    """

    @abstractmethod
    def embed(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) float32, nominally in [-1, 1], to unit vectors (B, D)."""

    def embed_face(self, face: Tensor) -> Tensor:
        """Embed aligned faces as `embed` does images; a subclass that crops images overrides it."""
        return self.embed(face)

    def similarity(self, a: Tensor, b: Tensor, aligned: bool = False) -> Tensor:
        """Return the cosine similarity (B,) float32 of the embeddings of images (B, 3, H, W), nominally in [-1, 1].

        Args:
            aligned: the images are faces that were aligned and cut out for face recognition, so they are not cropped.
        """
        embed = self.embed_face if aligned else self.embed
        with full_precision(a.device):
            return cosine(embed(a.float()), embed(b.float()))

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


class FeatureLoss(LossTerm):
    """A distance between feature maps of output and target, summed over layers and averaged over the batch."""

    @abstractmethod
    def features(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) float32, nominally in [-1, 1], to feature maps (B, C, h, w)."""

    @abstractmethod
    def layer_distances(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """Return the distance (B,) of each layer."""

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the distance (B,) float32, >= 0, of images (B, 3, H, W), nominally in [-1, 1].

        Gradients flow into `y_hat`; the features of `y` are computed without a graph.
        """
        with full_precision(y_hat.device):
            with torch.no_grad():
                target = self.features(y.float())
            return torch.stack(self.layer_distances(self.features(y_hat.float()), target)).sum(0)

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(inputs.y_hat, inputs.y).mean()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products (B,) of unit vectors (B, D) and (B, D)."""
    return (a * b).sum(dim=1)

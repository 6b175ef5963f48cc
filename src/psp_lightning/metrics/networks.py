"""Metrics per image that measure with a network: distances of features, and regions that a face parser finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from psp_lightning.loading import load_embedding
from psp_lightning.metrics.images import ImageMean
from psp_lightning.metrics.registry import register_metric
from psp_lightning.models.face_parser import KINDS, ToyFaceParser
from psp_lightning.models.layers import freeze
from psp_lightning.utils.errors import UserError

# The kind of region of each class of CelebAMask-HQ, in the order of its published label maps.
KIND_OF_CLASS = (0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 3, 3, 3, 4, 4, 5, 5, 1, 5)


class FeatureMetric(ImageMean):
    """Mean distance of the features of output and target, >= 0; lower is better.

    Args:
        distance: maps two image batches (B, 3, H, W) to (B,), such as `LPIPSLoss.distance`. It is a function and not a
            module, so the network is not copied or saved twice.
    """

    higher_is_better = False

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.distance = distance

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return self.distance(y_hat, y)


@register_metric("lpips")
class LPIPS(FeatureMetric):
    """Mean LPIPS distance; the loss term `lpips` chooses the network."""


@register_metric("perceptual")
class Perceptual(FeatureMetric):
    """Mean distance of the features of the domain's own network, which is not LPIPS; see the loss term `perceptual`."""


def mean_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union (B,) of maps of region indices (B, H, W), averaged over the regions in either."""
    values = []
    for kind in range(len(KINDS)):
        x, y = (a == kind).flatten(1), (b == kind).flatten(1)
        union = (x | y).sum(1).double()
        values.append(torch.where(union > 0, (x & y).sum(1) / union, torch.nan))
    return torch.stack(values).nanmean(0)


class _RegionIoU(ImageMean):
    """Intersection over union of the regions that a face parser finds; higher is better.

    Args:
        parser: file or name of a `ToyFaceParser`.

    Raises:
        UserError: the file is missing, or contains another network.
    """

    higher_is_better = True
    compared: str

    def __init__(self, parser: str = "toyfaces/parser", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        network = load_embedding(parser)
        if not isinstance(network, ToyFaceParser):
            raise UserError(f"{parser} is a {type(network).__name__}, not a face parser.")
        self.parser = freeze(network)
        self.convention = f"{parser}: {self.compared}; per image, mean over {', '.join(KINDS)} where they occur"


@register_metric("miou")
class MeanIoU(_RegionIoU):
    """Mean intersection over union of the regions of output and target."""

    compared = "regions of the output against regions of the target"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return mean_iou(self.parser.regions(y_hat), self.parser.regions(y))


@register_metric("miou_labels")
class LabelIoU(_RegionIoU):
    """Mean intersection over union of the regions of the output and the label map that is the source (seg2face)."""

    needs = ("source",)
    compared = "regions of the output against the label map"

    def per_image(self, y_hat: Tensor, y: Tensor, source: Tensor) -> Tensor:
        if source.shape[1] != len(KIND_OF_CLASS):
            raise UserError(
                f"miou_labels needs label maps with the {len(KIND_OF_CLASS)} classes of CelebAMask-HQ as source (task "
                "seg2face). Use miou for other tasks."
            )
        classes = torch.nn.functional.interpolate(source, self.parser.input_size, mode="nearest").argmax(1)
        kinds = torch.tensor(KIND_OF_CLASS, device=classes.device)[classes]
        return mean_iou(self.parser.regions(y_hat), kinds)

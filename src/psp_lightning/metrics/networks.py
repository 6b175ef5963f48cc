"""Metrics per image that use a network: distances of features, and regions that a face parser finds."""

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

AVERAGED = f"mean over {', '.join(KINDS)} where they occur"
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
    """Return the mean intersection over union (B,) of the regions that occur in either of two maps (B, H, W)."""
    values = []
    for kind in range(len(KINDS)):
        x, y = (a == kind).flatten(1), (b == kind).flatten(1)
        union = (x | y).sum(1).double()
        values.append(torch.where(union > 0, (x & y).sum(1) / union, torch.nan))
    return torch.stack(values).nanmean(0)


class _RegionMetric(ImageMean):
    """Base class of the metrics that compare regions found by a face parser.

    Args:
        parser: file or name of a `ToyFaceParser`.

    Raises:
        UserError: the file is missing, or contains another network.
    """

    compared: str

    def __init__(self, parser: str = "toyfaces/parser", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        network = load_embedding(parser)
        if not isinstance(network, ToyFaceParser):
            raise UserError(f"{parser} is a {type(network).__name__}, not a face parser.")
        self.parser = freeze(network)
        self.convention = f"{parser}: {self.compared}"


@register_metric("miou")
class MeanIoU(_RegionMetric):
    """Mean intersection over union of the regions of output and target; higher is better."""

    higher_is_better = True
    compared = f"regions of the output against regions of the target; per image, {AVERAGED}"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return mean_iou(self.parser.regions(y_hat), self.parser.regions(y))


@register_metric("miou_labels")
class LabelIoU(_RegionMetric):
    """Mean intersection over union of the regions in the output and in the source, a label map (seg2face).

    Higher is better.
    """

    higher_is_better = True
    needs = ("source",)
    compared = f"regions of the output against the label map; per image, {AVERAGED}"

    def per_image(self, y_hat: Tensor, y: Tensor, source: Tensor) -> Tensor:
        if source.shape[1] != len(KIND_OF_CLASS):
            raise UserError(
                f"it needs label maps with the {len(KIND_OF_CLASS)} classes of CelebAMask-HQ as source (task "
                "seg2face). Use miou for other tasks."
            )
        classes = torch.nn.functional.interpolate(source, self.parser.input_size, mode="nearest").argmax(1)
        kinds = torch.tensor(KIND_OF_CLASS, device=classes.device)[classes]
        return mean_iou(self.parser.regions(y_hat), kinds)


def turn(regions: Tensor) -> Tensor:
    """Return how far eyes and mouth lie to the right of the middle of the face, (B,), for region indices (B, H, W).

    The unit is the width of the image. The value is 0 for a face without eyes and mouth. On 150 drawn faces, the
    correlation with the sine of the angle by which the head is turned is 0.96.
    """
    x = (torch.arange(regions.shape[-1], device=regions.device) + 0.5) / regions.shape[-1]
    kinds = list(KINDS)
    features = torch.isin(regions, regions.new_tensor([kinds.index("eyes"), kinds.index("mouth")]))
    face = features | (regions == kinds.index("skin"))

    def middle(mask: Tensor) -> Tensor:
        columns = mask.sum(1)
        return (columns * x).sum(1) / columns.sum(1).clamp_min(1)

    return (middle(features) - middle(face)) * features.flatten(1).any(1)


@register_metric("pose")
class Pose(_RegionMetric):
    """Mean difference of how far the faces in output and target are turned to the side; lower is better."""

    higher_is_better = False
    compared = "distance of eyes and mouth from the middle of the face, output against target, in widths of the image"

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return (turn(self.parser.regions(y_hat)) - turn(self.parser.regions(y))).abs()

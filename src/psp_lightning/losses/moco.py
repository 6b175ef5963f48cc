"""The MoCo loss: the counterpart of the identity loss for images other than faces."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.losses.base import register_loss
from psp_lightning.losses.similarity import SimilarityLoss
from psp_lightning.models.layers import freeze
from psp_lightning.zoo.locate import find


def convert_moco(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the ResNet-50 of a MoCo or torchvision file to torchvision's keys, without the classifier.

    MoCo saves the query encoder under `module.encoder_q.`, next to the key encoder and the queue. Its projection head
    and torchvision's classifier are both called `fc`.
    """
    state = checkpoint.get("state_dict", checkpoint)
    assert isinstance(state, Mapping)
    prefix = "module.encoder_q."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


@register_loss("moco")
class MocoLoss(SimilarityLoss):
    """Cosine distance between the MoCo v2 features of output and target.

    Logs `moco_similarity` and, for an RGB source, `moco_improvement`.

    Args:
        weights: ResNet-50 checkpoint of MoCo v2 or torchvision; None looks in the weights folder.

    Raises:
        UserError: the file is missing, unreadable or for another network.

    Source: e4e (Tov et al. 2021), section 4.3.1, in the form of pSp's code at commit 5cfff38, against which the numbers
        were checked: images in [-1, 1], not normalised with ImageNet's mean and deviation, resized to 224 (nearest).
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        path = find("moco_v2", Path(weights) if weights is not None else None)
        state = convert_moco(read(path))

        from torchvision.models import resnet50  # here, because importing this library should not import torchvision

        network = resnet50(weights=None)
        network.fc = nn.Identity()
        load_strict(network, state, what=str(path))
        self.network = freeze(network)

    def embed(self, image: Tensor) -> Tensor:
        features = self.network(F.interpolate(image, size=(224, 224), mode="nearest"))  # (B, 2048)
        return F.normalize(features, dim=1)

"""Perceptual distance (LPIPS): the linear heads of the package `lpips` on an ImageNet backbone from a file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.losses.base import register_loss
from psp_lightning.losses.similarity import FeatureLoss
from psp_lightning.models.layers import freeze
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo.locate import find

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet"}  # name in lpips -> weight record


@register_loss("lpips")
class LPIPSLoss(FeatureLoss):
    """LPIPS distance, averaged over the batch.

    Args:
        net: `alex` (as in the paper), `vgg` or `squeeze`.
        weights: torchvision file of the backbone; None looks in the weights folder.

    Raises:
        UserError: `net` is unknown, or the file is missing, unreadable or for another network.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1;
        used as in pSp, section 3.2, eq. 2 (numbers checked against its code at commit 5cfff38).
    """

    def __init__(self, net: str = "alex", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise UserError(f"Unknown LPIPS network '{net}'.{suggest(net, BACKBONES)} Known: {', '.join(BACKBONES)}.")
        path = find(BACKBONES[net], Path(weights) if weights is not None else None)
        state = read(path)

        import lpips  # imported here because it imports torchvision and more

        with warnings.catch_warnings():  # lpips 0.1.4 calls a deprecated torchvision API
            warnings.simplefilter("ignore")
            # pnet_rand: the package would otherwise download the backbone
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # lpips splits torchvision's `features` into slices and keeps the index of each layer as its name in the slice.
        slices = {key.split(".", 1)[1]: key for key in network.net.state_dict()}
        features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        load_strict(network.net, {slices.get(key, key): value for key, value in features.items()}, what=str(path))
        self.network: Any = freeze(network)
        self.convention = f"LPIPS {network.version}, network {net}, RGB in [-1, 1]"

    def features(self, image: Tensor) -> list[Tensor]:
        layers = self.network.net(self.network.scaling_layer(image))
        # The package divides by sqrt(sum of squares) + eps, whose gradient is NaN where a pixel's features are all
        # zero; F.normalize has gradient zero there and agrees elsewhere.
        return [F.normalize(layer, dim=1, eps=1e-10) for layer in layers]

    def layer_distances(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        heads = self.network.lins
        return [head((x - y).square()).mean((1, 2, 3)) for head, x, y in zip(heads, a, b, strict=True)]

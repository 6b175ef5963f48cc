"""Perceptual distance (LPIPS): the linear heads of the package `lpips` on an ImageNet backbone from a file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.losses.base import LossInputs, LossTerm, full_precision, register_loss
from psp_lightning.models.layers import freeze
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo.locate import find

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet"}  # name in lpips -> weight record


def load_lpips(net: str, weights: str | os.PathLike[str] | None) -> Any:
    """Load the package's LPIPS v0.1 network, frozen: its own heads, and the backbone from a torchvision file.

    The package would download the backbone in its constructor; here the file is looked up and read safely.

    Raises:
        UserError: `net` is unknown; the file is missing, unreadable or of another network.
    """
    if net not in BACKBONES:
        raise UserError(f"Unknown LPIPS network '{net}'.{suggest(net, BACKBONES)} Known: {', '.join(BACKBONES)}.")
    path = find(BACKBONES[net], Path(weights) if weights is not None else None)
    state = read(path)

    import lpips  # here, since it imports torchvision and more

    with warnings.catch_warnings():  # torchvision's deprecated spelling inside lpips 0.1.4
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # lpips cuts torchvision's `features` into slices and keeps each layer's index as its name within the slice.
    slices = {key.split(".", 1)[1]: key for key in network.net.state_dict()}
    features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    load_strict(network.net, {slices.get(key, key): value for key, value in features.items()}, what=str(path))
    return freeze(network)


@register_loss("lpips")
class LPIPSLoss(LossTerm):
    """LPIPS distance, mean over the batch.

    Args:
        net: `alex` (the paper's), `vgg` or `squeeze`.
        weights: torchvision file of the backbone; None looks in the weights folder.

    Raises:
        UserError: see `load_lpips`.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1;
        used as in pSp, section 3.2, eq. 2 (numbers checked against its code at commit 5cfff38).
    """

    def __init__(self, net: str = "alex", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.network: Any = load_lpips(net, weights)

    def distance(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return the LPIPS distance of pairs.

        Args:
            y_hat: (B, 3, H, W) float, nominally [-1, 1]; gradients flow into it.
            y: (B, 3, H, W) float in [-1, 1]; its features are computed without a graph.

        Returns:
            (B,) float32, >= 0.
        """
        with full_precision(y_hat.device):
            with torch.no_grad():
                target = self._features(y.float())
            output = self._features(y_hat.float())
            layers = [
                head((a - b).square()).mean(dim=(1, 2, 3))  # (B, C, h, w) -> (B,)
                for head, a, b in zip(self.network.lins, output, target, strict=True)
            ]
            return torch.stack(layers).sum(dim=0)

    def _features(self, image: Tensor) -> list[Tensor]:
        layers = self.network.net(self.network.scaling_layer(image))
        # The package divides by sqrt(sum of squares) + eps, whose gradient is NaN where a pixel's features are all
        # zero; F.normalize agrees with it elsewhere and has gradient zero there.
        return [F.normalize(layer, dim=1, eps=1e-10) for layer in layers]

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(inputs.y_hat, inputs.y).mean()

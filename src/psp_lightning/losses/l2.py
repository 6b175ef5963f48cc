"""The mean squared error between output and target."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, register_loss


def mse_per_image(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference (B,) over channels and pixels of two (B, C, H, W) float images."""
    return (y_hat - y).square().flatten(1).mean(dim=1)


@register_loss("l2")
class L2Loss(LossTerm):
    """Pixel-wise squared error, averaged over all elements.

    Source: pSp, section 3.2, eq. 1 (numbers checked against its code at commit 5cfff38).
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        return mse_per_image(inputs.y_hat, inputs.y).mean()

"""Mean squared error between output and target."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, register_loss


def mse_per_image(y_hat: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference over channels and pixels.

    Args:
        y_hat: (B, C, H, W) float.
        y: (B, C, H, W) float, the same range.

    Returns:
        (B,) float, >= 0.
    """
    return (y_hat - y).square().flatten(1).mean(dim=1)


@register_loss("l2")
class L2Loss(LossTerm):
    """Pixel-wise squared error, mean over everything.

    Source: pSp, section 3.2, eq. 1 (numbers checked against its code at commit 5cfff38).
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        return mse_per_image(inputs.y_hat, inputs.y).mean()

"""l2 and LPIPS of the face crop, because frontalization weights the face more than its surroundings."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, face_crop, register_loss
from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.losses.lpips import LPIPSLoss


@register_loss("l2_crop")
class L2CropLoss(LossTerm):
    """Pixel-wise squared error of the face crop.

    Source: pSp, section 4.2 (frontalization), and its code at commit 5cfff38.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        return mse_per_image(face_crop(inputs.y_hat), face_crop(inputs.y)).mean()


@register_loss("lpips_crop")
class LPIPSCropLoss(LPIPSLoss):
    """LPIPS of the face crop; arguments as for `LPIPSLoss`.

    Source: pSp, section 4.2 (frontalization), and its code at commit 5cfff38.
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.distance(face_crop(inputs.y_hat), face_crop(inputs.y)).mean()

"""The distance between the encoder's codes and the known codes of generated images."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, register_loss
from psp_lightning.utils.errors import UserError


@register_loss("latent")
class LatentLoss(LossTerm):
    """Mean squared difference in W+ between the encoder's codes and the codes that generated images were drawn from.

    It is averaged over the styles, over the numbers of each style, and over the generated samples of the batch; other
    samples do not count. If a batch has no generated samples, such as in a validation on images, a `CompositeLoss`
    leaves this loss out.

    Source: In-domain GAN inversion (arXiv:2004.00049), where it is the loss of a conventional encoder.
    """

    needs = ("codes",)

    def forward(self, inputs: LossInputs) -> Tensor:
        if inputs.codes is None or inputs.w_plus is None:
            raise UserError("The loss 'latent' compares codes: pass codes and w_plus to LossInputs.")
        distance = (inputs.w_plus - inputs.codes).square().flatten(1).mean(dim=1)  # (B,)
        if inputs.generated is None:
            return distance.mean()
        return (distance * inputs.generated).sum() / inputs.generated.sum().clamp(min=1)

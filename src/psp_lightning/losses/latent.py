"""The distance of the codes from the known codes of generated images."""

from __future__ import annotations

from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, register_loss
from psp_lightning.utils.errors import UserError


@register_loss("latent")
class LatentLoss(LossTerm):
    """Mean squared difference of the codes and the codes that a generated image was drawn from, in W+.

    It is averaged over the styles and their numbers, and over the generated samples of the batch; others do not count.
    A `CompositeLoss` leaves it out of a batch without any, such as a validation on images.

    Source: In-domain GAN inversion (arXiv:2004.00049), as the loss of a conventional encoder.
    """

    needs = ("codes",)

    def forward(self, inputs: LossInputs) -> Tensor:
        if inputs.codes is None or inputs.w_plus is None:
            raise UserError("The loss 'latent' compares codes: pass codes and w_plus to LossInputs.")
        distance = (inputs.w_plus - inputs.codes).square().flatten(1).mean(dim=1)  # (B,)
        if inputs.generated is None:
            return distance.mean()
        return (distance * inputs.generated).sum() / inputs.generated.sum().clamp(min=1)

"""The distance of the codes from the average latent."""

from __future__ import annotations

import torch
from torch import Tensor

from psp_lightning.losses.base import LossInputs, LossTerm, register_loss
from psp_lightning.utils.errors import UserError


@register_loss("w_norm")
class WNormLoss(LossTerm):
    """Euclidean norm of the whole code of each sample relative to the average latent, averaged over the batch.

    If the average is added to the encoder's output (`delta_w_plus`), this output is the difference; otherwise it is the
    code itself. The reference uses its norm in both settings. Without `delta_w_plus`, the difference is
    `w_plus - latent_avg`, or `w_plus` if there is no average.

    Source: pSp, section 3.2, eq. 4 (numbers checked against its code at commit 5cfff38).
    """

    def forward(self, inputs: LossInputs) -> Tensor:
        delta = inputs.delta_w_plus
        if delta is None:
            if inputs.w_plus is None:
                raise UserError("The loss 'w_norm' needs the codes: pass delta_w_plus or w_plus to LossInputs.")
            delta = inputs.w_plus if inputs.latent_avg is None else inputs.w_plus - inputs.latent_avg
        return torch.linalg.vector_norm(delta.flatten(1), dim=1).mean()  # (B, n_styles * style_dim) -> (B,) -> ()

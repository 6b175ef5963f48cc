"""Loss terms (one file each), their registry (`LOSSES`) and their weighted sum."""

from psp_lightning.losses.base import LOSSES, LossInputs, LossTerm, TermOutput, register_loss
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.losses.cropped import L2CropLoss, LPIPSCropLoss
from psp_lightning.losses.identity import IDLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.losses.latent import LatentLoss
from psp_lightning.losses.lpips import LPIPSLoss
from psp_lightning.losses.moco import MocoLoss
from psp_lightning.losses.perceptual import PerceptualLoss
from psp_lightning.losses.similarity import SimilarityLoss
from psp_lightning.losses.w_norm import WNormLoss

__all__ = [
    "LOSSES",
    "CompositeLoss",
    "IDLoss",
    "L2CropLoss",
    "L2Loss",
    "LPIPSCropLoss",
    "LPIPSLoss",
    "LatentLoss",
    "LossInputs",
    "LossTerm",
    "MocoLoss",
    "PerceptualLoss",
    "SimilarityLoss",
    "TermOutput",
    "WNormLoss",
    "register_loss",
]

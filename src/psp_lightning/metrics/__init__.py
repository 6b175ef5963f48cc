"""torchmetrics metrics that use the same functions as the losses."""

from psp_lightning.metrics.features import FID, KID, DomainFrechet, DomainKernel
from psp_lightning.metrics.identity import AlignedIdSimilarity
from psp_lightning.metrics.images import MSE, PSNR, IdSimilarity, ImageMean
from psp_lightning.metrics.networks import LPIPS, LabelIoU, MeanIoU, Perceptual, Pose
from psp_lightning.metrics.registry import METRICS, register_metric
from psp_lightning.metrics.sources import Consistency, Diversity, HoleMSE, KnownMSE
from psp_lightning.metrics.structure import SSIM, MultiScaleSSIM

__all__ = [
    "FID",
    "KID",
    "LPIPS",
    "METRICS",
    "MSE",
    "PSNR",
    "SSIM",
    "AlignedIdSimilarity",
    "Consistency",
    "Diversity",
    "DomainFrechet",
    "DomainKernel",
    "HoleMSE",
    "IdSimilarity",
    "ImageMean",
    "KnownMSE",
    "LabelIoU",
    "MeanIoU",
    "MultiScaleSSIM",
    "Perceptual",
    "Pose",
    "register_metric",
]

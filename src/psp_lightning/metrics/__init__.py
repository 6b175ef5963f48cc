"""torchmetrics metrics that use the same functions as the losses."""

from psp_lightning.metrics.images import MSE, PSNR, IdSimilarity, ImageMean
from psp_lightning.metrics.registry import METRICS, register_metric

__all__ = ["METRICS", "MSE", "PSNR", "IdSimilarity", "ImageMean", "register_metric"]

"""torchmetrics metrics over the same functions as the losses."""

from psp_lightning.metrics.images import MSE, PSNR, IdSimilarity, ImageMean

__all__ = ["MSE", "PSNR", "IdSimilarity", "ImageMean"]

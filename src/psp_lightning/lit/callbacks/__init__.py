"""Callbacks for training."""

from psp_lightning.lit.callbacks.batch_norm import AverageBatchNorm
from psp_lightning.lit.callbacks.curves import Curves
from psp_lightning.lit.callbacks.epoch_start import EpochStart
from psp_lightning.lit.callbacks.forecast import Forecast
from psp_lightning.lit.callbacks.image_grids import ImageGrids
from psp_lightning.lit.callbacks.last_checkpoint import LastCheckpoint, step_checkpoints
from psp_lightning.lit.callbacks.overfit import LossFalls
from psp_lightning.lit.callbacks.progress_bar import ProgressBar
from psp_lightning.lit.callbacks.pruning import Pruning
from psp_lightning.lit.callbacks.samples import ExportGenerator, SampleGrids
from psp_lightning.lit.callbacks.validation import ValidateEvery

__all__ = [
    "AverageBatchNorm", "Curves", "EpochStart", "ExportGenerator", "Forecast", "ImageGrids", "LastCheckpoint",
    "LossFalls", "ProgressBar", "Pruning", "SampleGrids", "ValidateEvery", "step_checkpoints",
]  # fmt: skip

"""Learning curves of the run as a picture in its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from psp_lightning.lit.curves import CURVES, read_log, save_curves
from psp_lightning.lit.files import CsvLog
from psp_lightning.utils.arguments import whole

log = logging.getLogger(__name__)


class Curves(Callback):
    """Draws every value in the csv log over the steps: `folder`/curves.png, replaced after each validation.

    It is also drawn when the run ends. Without a `CsvLog` among the loggers, nothing is drawn. A picture that cannot be
    drawn, for example because matplotlib is not installed, is reported once; the training continues.

    Args:
        folder: the run directory.
        every_n_steps: steps between two further pictures, for trainings without a validation; 0: none.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 0) -> None:
        self.path, self.every_n_steps = Path(folder) / CURVES, whole("every_n_steps", every_n_steps, 0)
        self._drawn_step, self._reported = -1, False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        logger = next((item for item in trainer.loggers if isinstance(item, CsvLog)), None)
        if logger is None or not trainer.is_global_zero or trainer.global_step == self._drawn_step:
            return
        self._drawn_step = trainer.global_step
        try:
            file = Path(logger.log_dir) / "metrics.csv"
            if file.is_file():  # a run may end before its first row
                save_curves(self.path, read_log(file))
        except ImportError as error:
            self._report("%s is not drawn: %s is not installed; pip install 'psp-lightning[demo]'", error.name)
        except Exception as error:  # a picture must not end a training
            self._report("%s is not drawn: %s", error)

    def _report(self, text: str, reason: object) -> None:
        if not self._reported:
            log.warning(text, CURVES, reason)
        self._reported = True

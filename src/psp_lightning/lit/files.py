"""The files of a run: atomic checkpoints, a CSV log that survives a resume, pictures."""

from __future__ import annotations

import csv
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from psp_lightning.utils import images
from psp_lightning.utils.atomic import save_torch
from psp_lightning.utils.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O through a temporary file, so that the previous checkpoint survives a crash or a full disk.

    Args:
        path: the checkpoint that the run continues from.
        content: its content if it has already been read. The first load of `path` returns it; other loads read a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, content: dict[str, Any] | None = None) -> None:
        self._path, self._content = None if path is None else os.path.abspath(path), content

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._content is None or os.path.abspath(path) != self._path:
            return super().load_checkpoint(path, *args, **kwargs)
        content, self._content = self._content, None
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_torch(checkpoint, path)


class CsvLog(CSVLogger):
    """A log in `folder`/metrics.csv with one column per logged key; a resumed run keeps the rows up to its step."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self._kept: list[dict[str, Any]] = []

    def keep_until(self, step: int) -> None:
        """Continue the log of a run that resumes from `step`, and drop the rows that were logged after it."""
        path = Path(self.log_dir) / "metrics.csv"
        if path.is_file():
            with path.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
            self._kept = [row for row in rows if int(row["step"]) <= step]

    @property
    def experiment(self) -> Any:
        fresh = self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0
        if fresh and (path := Path(self.log_dir) / "metrics.csv").exists():
            path.unlink()  # self._kept has the rows of the old file, which Lightning would delete with a warning
        experiment = super().experiment
        if fresh and self._kept:
            experiment.metrics = list(self._kept)
            experiment.save()
        return experiment


class WandbRun(WandbLogger):
    """A `WandbLogger` that keeps its run's id in the run directory `save_dir`, so that a resumed run continues it.

    Raises:
        UserError: wandb cannot start the run, for example because nobody is logged in.
    """

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        identity = Path(save_dir) / "wandb_id"
        if not identity.exists():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(secrets.token_hex(4))
        super().__init__(save_dir=save_dir, id=identity.read_text(), resume="allow", **options)
        from wandb.errors import Error

        try:
            _ = self.experiment  # report errors before the training starts
        except Error as error:
            raise UserError(f"wandb: {error} Log in with `wandb login`, or set logger.wandb.offline=true.") from None


def keep_picture(trainer: pl.Trainer, picture: Image.Image, path: Path, key: str) -> None:
    """Write a picture to `path`, and log it as `key` to every logger that supports pictures."""
    images.save_atomic(picture, path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # wandb; as PIL, because it casts float images to black
            logger.log_image(key=key, images=[picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")

"""Files of a run: checkpoints written atomically, a CSV log that survives a resume, pictures."""

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
    """Writes a checkpoint through a temporary file beside it: a crash or a full disk leaves the former one intact.

    Args:
        path: the checkpoint that the run continues from.
        content: what it holds, where it has been read already; it is given out once, and for this path only.
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
    """`metrics.csv` with a column for each logged key; on a resume the rows up to its step are kept.

    Args:
        folder: receives `metrics.csv`.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self._kept: list[dict[str, Any]] = []

    def keep_until(self, step: int) -> None:
        """Continue the file of a run that resumes from `step`; later rows, of a process that ended, are dropped."""
        path = Path(self.log_dir) / "metrics.csv"
        if path.is_file():
            with path.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
            self._kept = [row for row in rows if int(row["step"]) <= step]

    @property
    def experiment(self) -> Any:
        fresh = self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0
        if fresh and (path := Path(self.log_dir) / "metrics.csv").exists():
            path.unlink()  # its rows are in self._kept; Lightning would warn and delete it
        experiment = super().experiment
        if fresh and self._kept:
            experiment.metrics = list(self._kept)
            experiment.save()
        return experiment


class WandbRun(WandbLogger):
    """The wandb run of a run directory: a resumed run continues it, by the id that the directory keeps.

    Args:
        save_dir: the run directory.
        **options: of `WandbLogger`.

    Raises:
        UserError: wandb refuses the run; nobody is logged in.
    """

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        identity = Path(save_dir) / "wandb_id"
        if not identity.exists():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(secrets.token_hex(4))
        super().__init__(save_dir=save_dir, id=identity.read_text(), resume="allow", **options)
        from wandb.errors import Error

        try:
            _ = self.experiment  # a mistake is reported before the training starts
        except Error as error:
            raise UserError(f"wandb: {error} Log in with `wandb login`, or set logger.wandb.offline=true.") from None


def keep_picture(trainer: pl.Trainer, picture: Image.Image, path: Path, key: str) -> None:
    """Write a picture to `path`, and under `key` to every logger that takes pictures."""
    images.save_atomic(picture, path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # wandb; PIL, because it would cast float images to black
            logger.log_image(key=key, images=[picture], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")

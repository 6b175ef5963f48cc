"""Files of a run: checkpoints written atomically, a CSV log that survives a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from psp_lightning.utils.atomic import save_torch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint through a temporary file beside it: a crash or a full disk leaves the former one intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_torch(checkpoint, path)


class CsvLog(CSVLogger):
    """`metrics.csv` with a column for each logged key; on a resume the rows up to its step are kept.

    Args:
        folder: receives `metrics.csv`.
        keep_until: None for a new run; otherwise the step that the run resumes from: later rows were logged by a
            process that ended before it saved them, and are written again.
    """

    def __init__(self, folder: str | Path, keep_until: int | None = None) -> None:
        self._kept = _read_rows(Path(folder) / "metrics.csv", keep_until) if keep_until is not None else []
        super().__init__(save_dir=folder, name="", version="")

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


def _read_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if int(row["step"]) <= last_step]

"""A job's side of a search: its trial, its objective and the file with its result."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from psp_lightning.build.instantiate import instantiate
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.devices import is_restarted
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    import optuna

RESULT = "objective.json"  # in the run folder of a trial that has ended: its state and value


class Pruned(float):
    """The last value of a trial that ended early because other trials are better."""


def open_storage(place: str) -> Any:
    """Return the storage of a study: a database's URL, or the file at `place`, whose folder is created."""
    if "://" in place:
        return place
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith(".log"):
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        return JournalStorage(JournalFileBackend(place))
    return f"sqlite:///{place}"


@dataclass(frozen=True)
class TrialPlace:
    """Where a job finds its own trial, to report values while it runs. It can be pickled.

    Attributes:
        storage: a URL, or the absolute path of a file.
        study_name: name of the study.
        number: number of the trial.
        pruner: node of the pruner, as YAML text.
    """

    storage: str
    study_name: str
    number: int
    pruner: str

    def open(self) -> optuna.Trial:
        """Return the trial, which can report values and be asked whether it should end."""
        optuna = optuna_package()
        pruner = instantiate(OmegaConf.create({"hydra": {"sweeper": {"pruner": OmegaConf.create(self.pruner)}}}),
                             "hydra.sweeper.pruner")  # fmt: skip
        study = optuna.load_study(
            study_name=self.study_name, storage=open_storage(self.storage), pruner=pruner,
            sampler=optuna.samplers.RandomSampler(),  # not used: the values are chosen
        )  # fmt: skip
        return optuna.Trial(study, study.trials[self.number]._trial_id)


def check_search(cfg: DictConfig) -> TrialPlace | None:
    """Return the place of this job's trial if trials may be pruned; None otherwise, and outside a search.

    Raises:
        UserError: no validation would measure the objective, or `-m` is missing.
    """
    hydra = HydraConfig.get()
    if not _is_search():
        if hydra.mode != RunMode.MULTIRUN and not _is_basic() and cfg.resume is None:
            raise UserError("hparams_search= selects a search, which needs -m: psp-train -m hparams_search=...")
        return None
    check_objective(cfg)
    sweeper = hydra.sweeper
    if sweeper.get("pruner") is None:
        return None
    storage = sweeper.storage if "://" in sweeper.storage else os.path.join(hydra.runtime.cwd, sweeper.storage)
    return TrialPlace(storage, sweeper.study_name, int(hydra.job.num), OmegaConf.to_yaml(sweeper.pruner, resolve=True))


def check_objective(cfg: DictConfig) -> None:
    """Raise a UserError if no validation of a training would measure the objective."""
    if cfg.objective is None:
        raise UserError("a search needs an objective=NAME, such as val/loss.")
    if not cfg.trainer.limit_val_batches or cfg.trainer.val_every > cfg.trainer.max_steps:
        raise UserError(
            f"objective={cfg.objective} would not be measured, because there is no validation: trainer.val_every="
            f"{cfg.trainer.val_every}, trainer.max_steps={cfg.trainer.max_steps}, trainer.limit_val_batches="
            f"{cfg.trainer.limit_val_batches}. Set trainer.val_every={cfg.trainer.max_steps} or less."
        )


def keep_result(cfg: DictConfig, value: float | None) -> float | None:
    """Return the value of a job; in a search, also write it to the run folder.

    A search that runs several trials at the same time learns their values when all of them have ended. If it is stopped
    before that, it finds the values in the files.
    """
    if _is_search() and value is not None and math.isfinite(value):
        pruned = isinstance(value, Pruned)  # its last report is its value
        result = {"state": "PRUNED" if pruned else "COMPLETE", "value": None if pruned else float(value)}
        with replacing(Path(cfg.paths.output_dir, RESULT)) as part:
            part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return value


def earlier_result(cfg: DictConfig) -> float | None:
    """Return the value that a job wrote before Slurm started it again, or None."""
    file = Path(cfg.paths.output_dir, RESULT)
    if not (_is_search() and is_restarted() and file.is_file()):
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return Pruned("nan") if result["state"] == "PRUNED" else float(result["value"])


def _is_basic() -> bool:
    """Return whether the sweeper of this job is Hydra's own."""
    return str(HydraConfig.get().sweeper.get("_target_")).endswith("BasicSweeper")


def _is_search() -> bool:
    """Return whether this job is a trial of a search."""
    return HydraConfig.get().mode == RunMode.MULTIRUN and not _is_basic()


def optuna_package() -> Any:
    """Return the package optuna; raise a UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"a search needs the package optuna: pip install 'psp-lightning[sweep]' ({error})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

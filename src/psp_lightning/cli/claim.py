"""Claim the folder of a run or a sweep before Hydra writes to it, and the folder of each job of a sweep."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from psp_lightning.cli.mistakes import fail
from psp_lightning.cli.ranks import share
from psp_lightning.cli.settings import quote
from psp_lightning.lit.run_folder import claim_run, claimed, new_folder
from psp_lightning.utils.devices import check_launched, count_devices, is_first_rank, started_rank
from psp_lightning.utils.errors import UserError

ANOTHER = "Choose another hydra.sweep.dir=DIR."


class ClaimFolder(Callback):
    """A Hydra callback that claims the folder of a run or a sweep until it ends.

    If the default name, which contains the time, is taken, the run or sweep gets another name. A taken name is an error
    if the user gave it. Ranks that torchrun or srun started share one folder, which the first rank claims.
    """

    held: ClassVar[FileLock | None] = None  # on the class, because Hydra drops the callback if a job fails

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)  # names may refer to it
        with _reporting():
            if started_rank() is not None:  # before waiting for ranks that do not exist
                devices = count_devices(config.trainer.accelerator, config.trainer.devices)
                check_launched(devices, config.trainer.num_nodes)
            # names contain the time, which differs between ranks
            run, folder = share(functools.partial(self._claim_run, config))
            if not is_first_rank():
                with read_write(config), open_dict(config):
                    config.run = run
                    config.hydra.run.dir = folder
                    config.hydra.output_subdir = None  # the first rank writes the log and the settings
                    config.hydra.job_logging = {"version": 1, "root": None, "disable_existing_loggers": False}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _reporting():
            _check_sweep(config)
            folder = share(functools.partial(self._claim_sweep, config))
            overrides = [f"hydra.sweep.dir={quote(folder)}"]
            if not is_first_rank():
                overrides += ["hydra.output_subdir=null", "hydra/job_logging=none"]
            with read_write(config), open_dict(config):  # jobs are composed again, from the overrides
                config.hydra.sweep.dir = folder
                config.hydra.overrides.hydra.extend(overrides)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._release()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._release()

    def _claim_run(self, config: DictConfig) -> list[str]:
        """Claim the folder of a run and return the run's name and the folder."""
        folder = Path(config.hydra.run.dir)
        if not _is_given(config, "hydra.run.dir"):
            home = Path(config.paths.runs, str(config.task.name))
            name = os.path.relpath(folder, home)
            if name.split(os.sep)[0] in (os.curdir, os.pardir):
                raise UserError(f"run={config.run} is not the name of a folder inside {home}.")
            if OmegaConf.is_interpolation(config, "run"):
                folder = new_folder(folder)
                config.run = os.path.relpath(folder, home)
        resume = config.resume not in (None, "auto") and folder.resolve() in Path(config.resume).resolve().parents
        self._claim(folder, resume, f"Continue it with resume={folder}, or choose another run=NAME.")
        return [str(config.run), os.fspath(folder)]

    def _claim_sweep(self, config: DictConfig) -> str:
        """Claim the folder of a sweep and return it."""
        folder = Path(config.hydra.sweep.dir)
        if not _is_given(config, "hydra.sweep.dir"):
            folder = new_folder(folder)
        # each job rejects a folder that contains a run
        self._claim(folder, True, ANOTHER)
        return os.fspath(folder)

    def _claim(self, folder: Path, resume: bool, hint: str) -> None:
        self._release()
        ClaimFolder.held = claim_run(folder, resume, hint)

    def _release(self) -> None:
        if self.held is not None:
            self.held.release()
            ClaimFolder.held = None


def claiming_jobs(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate the function below `hydra.main`: each job of a sweep claims its run folder until it ends.

    `ClaimFolder` has claimed the folder of a run that is not part of a sweep. The process that starts the ranks of a
    job claims for them; of the ranks of torchrun or srun, the first one claims.
    """

    @functools.wraps(task)
    def run(cfg: Any) -> Any:
        if HydraConfig.get().mode != RunMode.MULTIRUN or not is_first_rank():
            return task(cfg)
        with claimed(Path(cfg.paths.output_dir), True, ANOTHER):  # `fit` rejects a folder that contains a run
            return task(cfg)

    return run


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """Report a mistake and exit, because Hydra would turn an exception into a warning."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except (OSError, OmegaConfBaseException):
        pass  # Hydra meets the same error and reports it


def _check_sweep(config: DictConfig) -> None:
    """Raise a UserError for a sweep that each rank of torchrun or srun would run by itself."""
    for name in ("sweeper", "launcher"):
        kind = str(config.hydra[name].get("_target_")).rpartition(".")[2]
        if started_rank() is not None and kind not in ("BasicSweeper", "BasicLauncher"):
            raise UserError(
                f"{kind} does not work under torchrun or srun, where each process would use its own. Start the command "
                "itself, with trainer.devices=N: it starts the processes of each job."
            )


def _is_given(config: DictConfig, key: str) -> bool:
    """Return whether the command line sets one of Hydra's settings."""
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)

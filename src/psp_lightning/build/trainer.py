"""The Trainer of both trainings, with its callbacks and loggers."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from psp_lightning.build.instantiate import import_plugins, instantiate
from psp_lightning.checkpoints.read import is_plain, read
from psp_lightning.lit.callbacks import EpochStart, LastCheckpoint, ProgressBar, ValidateEvery
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.devices import check_launched, count_devices, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory

Checkpoint = dict[str, Any]


@dataclass
class Training:
    """Everything that a training needs.

    Attributes:
        resume_step: the step of the checkpoint that it continues from; None for a new run.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    data: pl.LightningDataModule
    resume_step: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C or SIGTERM ended the fit."""
        return any(c.interrupted for c in self.trainer.callbacks if isinstance(c, LastCheckpoint))  # type: ignore[attr-defined]


def prepare(cfg: DictConfig) -> None:
    """Check the numbers that no constructor of ours takes, import plugins and seed all random numbers.

    Raises:
        UserError: a number that makes no sense, a plugin that does not exist.
    """
    quiet()
    cfg.seed = whole("seed", cfg.seed, 0, 2**32 - 1)
    for key in ("max_steps", "val_every", "log_every_n_steps", "accumulate_grad_batches"):
        if key in cfg.trainer:
            cfg.trainer[key] = whole(f"trainer.{key}", cfg.trainer[key], 1)
    number("optimizer.lr", cfg.optimizer.get("lr"), 0, optional=True)
    import_plugins(cfg.plugins)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)


def quiet() -> None:
    """Leave out what Lightning says that does not concern a user of this library."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # its import has set them to INFO: tips, device counts
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Found .* in eval mode at the start",  # the frozen networks are meant to be
        ".*does not have many workers.*",  # data.num_workers is a setting, and drawn faces need none
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # the values are gathered already
        ".*broadcast_buffers.*",
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own
    ):
        warnings.filterwarnings("ignore", message)


def read_resumed(path: Path | None, key: str, command: str) -> Checkpoint | None:
    """Read the checkpoint that a run continues from, None for a new run.

    Lightning is given what was read. Where a user's callback saved something that is not plain, Lightning reads the
    file itself and refuses it with its own message.

    Raises:
        UserError: the file has no `key`: `command` did not write it.
    """
    if path is None:
        return None
    content = read(path)
    if not {key, "global_step"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of {command}.")
    return content


def build_trainer(
    cfg: DictConfig, own: list[Callback], ddp: Strategy, resume: Checkpoint | None, **options: Any
) -> pl.Trainer:
    """Build the Trainer on the devices of the settings.

    Args:
        cfg: the composed configuration.
        own: callbacks that the training itself needs.
        ddp: strategy for several processes, where `trainer.strategy` is auto or ddp.
        resume: content of the checkpoint that the run continues from.
        **options: of the Trainer; those of `cfg.trainer` come on top.

    Raises:
        UserError: devices that do not exist, or options that the Trainer refuses.
    """
    options |= OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[arg-type]
    options["accelerator"], options["devices"] = resolve_devices(options["accelerator"], options["devices"])
    local = count_devices(options["accelerator"], options["devices"])
    check_launched(local)
    if computes_on_cpu(options["accelerator"]):
        keep_freed_memory()
    if options["strategy"] in ("auto", "ddp"):
        options["strategy"] = ddp if local * options["num_nodes"] > 1 else "auto"
    if (val_every := options.pop("val_every", None)) is not None:
        own = [*own, ValidateEvery(val_every)]
        options |= {"val_check_interval": 1, "check_val_every_n_epoch": None}
    try:
        return pl.Trainer(
            **options,
            max_epochs=-1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module shards
            default_root_dir=cfg.paths.output_dir,
            callbacks=build_callbacks(cfg, own),
            logger=build_loggers(cfg, resume),
            plugins=[AtomicCheckpointIO(cfg.resume, resume if is_plain(resume) else None)],
            enable_model_summary=False,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def build_callbacks(cfg: DictConfig, own: list[Callback]) -> list[Callback]:
    """Build the selected callbacks; the last checkpoint comes last, so that it holds the state of the others."""
    callbacks = [EpochStart(), *own]
    callbacks += [instantiate(cfg, f"callbacks.{key}") for key, node in cfg.callbacks.items() if node]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(refresh_rate=1))
    if not any(isinstance(callback, LastCheckpoint) for callback in callbacks):  # what an interrupted run leaves
        callbacks.append(LastCheckpoint(Path(cfg.paths.output_dir, "checkpoints"), None))
    return sorted(callbacks, key=lambda callback: isinstance(callback, LastCheckpoint))


def build_loggers(cfg: DictConfig, resume: Checkpoint | None) -> list[Logger]:
    """Build the selected loggers; those of a resumed run go on from its checkpoint."""
    loggers = [instantiate(cfg, f"logger.{name}") for name, node in (cfg.logger or {}).items() if node]
    for logger in loggers:
        if resume is not None and isinstance(logger, CsvLog):
            logger.keep_until(resume["global_step"])
    return loggers

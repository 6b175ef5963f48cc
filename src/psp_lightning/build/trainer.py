"""Build the Trainer of both trainings, with its callbacks and loggers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
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
from psp_lightning.lit.distributed import cluster
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.devices import count_devices, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory

Checkpoint = dict[str, Any]
FIXED = {  # options of Lightning's Trainer that other settings determine
    "max_epochs": "trainer.max_steps sets the length of a run",
    "val_check_interval": "trainer.val_every sets the steps between validations",
    "check_val_every_n_epoch": "trainer.val_every sets the steps between validations",
    "num_sanity_val_steps": "a run starts with training",
    "use_distributed_sampler": "the data module gives each rank its share",
    "default_root_dir": "run=NAME names the run's folder, and paths.runs the folder of all runs",
    "callbacks": "callbacks.NAME sets a callback",
    "logger": "logger=NAME chooses the loggers",
    "plugins": "checkpoints are written by this library",
    "sync_batchnorm": "model.batch_norm sets it",
    "enable_model_summary": "no summary is printed",
}


@dataclass
class Training:
    """The objects of a training.

    Attributes:
        resume_step: step of the checkpoint to resume from; None for a new run.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    data: pl.LightningDataModule
    resume_step: int | None = None

    @property
    def interrupted(self) -> bool:
        """Return whether ctrl-C or SIGTERM ended the fit."""
        return any(c.interrupted for c in self.trainer.callbacks if isinstance(c, LastCheckpoint))  # type: ignore[attr-defined]


def prepare(cfg: DictConfig) -> None:
    """Check the numbers that no constructor of this library checks, import plugins and seed all random generators.

    Raises:
        UserError: a number is out of range, or a plugin does not exist.
    """
    quiet()
    if fixed := sorted(FIXED.keys() & cfg.trainer.keys()):
        raise UserError(f"trainer.{fixed[0]} cannot be set: {FIXED[fixed[0]]}.")
    cfg.seed = whole("seed", cfg.seed, 0, 2**32 - 1)
    for key in ("max_steps", "val_every", "log_every_n_steps", "accumulate_grad_batches"):
        if key in cfg.trainer:
            cfg.trainer[key] = whole(f"trainer.{key}", cfg.trainer[key], 1)
    number("optimizer.lr", cfg.optimizer.get("lr"), 0, optional=True)
    import_plugins(cfg.plugins)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)


def quiet() -> None:
    """Hide Lightning's messages that are irrelevant to users of this library."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # importing it sets them to INFO: tips, device counts
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Found .* in eval mode at the start",  # intended for the frozen networks
        ".*does not have many workers.*",  # data.num_workers is a setting; drawn faces need no workers
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # the values are synchronized already
        ".*broadcast_buffers.*",
        "You have overridden `on_after_batch_transfer`",  # LitPSP draws generated samples there
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",  # a resumed run uses its own
    ):
        warnings.filterwarnings("ignore", message)


def read_resumed(path: Path | None, key: str, command: str) -> Checkpoint | None:
    """Read the checkpoint that a run resumes from; return None for a new run.

    Lightning receives this content. If a user's callback saved an object that is not plain, Lightning reads the file
    itself and rejects it with its own message.

    Raises:
        UserError: the file has no `key`, so `command` did not write it.
    """
    if path is None:
        return None
    content = read(path)
    if not {key, "global_step"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of {command}.")
    return content


def build_trainer(
    cfg: DictConfig,
    own: list[Callback],
    ddp: Strategy,
    resume: Checkpoint | None,
    plugins: Sequence[Any] = (),
    **options: Any,
) -> pl.Trainer:
    """Build the Trainer.

    Args:
        cfg: the composed configuration.
        own: callbacks that the training always needs.
        ddp: strategy for several processes if `trainer.strategy` is auto or ddp.
        resume: content of the checkpoint that the run resumes from.
        plugins: plugins of the Trainer.
        **options: options of the Trainer; `cfg.trainer` overrides them.

    Raises:
        UserError: devices do not exist, or the Trainer rejects an option.
    """
    options |= OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[arg-type]
    options["accelerator"], options["devices"] = resolve_devices(options["accelerator"], options["devices"])
    local = count_devices(options["accelerator"], options["devices"])
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
            plugins=[AtomicCheckpointIO(cfg.resume, resume if is_plain(resume) else None), cluster(), *plugins],
            enable_model_summary=False,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def build_callbacks(cfg: DictConfig, own: list[Callback]) -> list[Callback]:
    """Build the selected callbacks. `LastCheckpoint` comes last, because it saves the state of the others."""
    callbacks = [EpochStart(), *own]
    callbacks += _build_group(cfg, "callbacks", Callback)
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(refresh_rate=1))
    if not any(isinstance(callback, LastCheckpoint) for callback in callbacks):  # an interrupted run needs it to resume
        callbacks.append(LastCheckpoint(Path(cfg.paths.output_dir, "checkpoints"), None))
    return sorted(callbacks, key=lambda callback: isinstance(callback, LastCheckpoint))


def _build_group(cfg: DictConfig, group: str, kind: type) -> list[Any]:
    """Build all nodes of a group that are not null; raise a UserError if one is not an instance of `kind`."""
    built = []
    for name, node in (cfg[group] or {}).items():
        if node:
            built.append(instantiate(cfg, f"{group}.{name}"))
            if not isinstance(built[-1], kind):
                raise UserError(f"{group}.{name}: {node._target_} must derive from {kind.__module__}.{kind.__name__}.")
    return built


def run_prediction(trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> None:
    """Predict. The module and the callbacks keep the results.

    Raises:
        KeyboardInterrupt: ctrl-C or SIGTERM; Lightning itself would end the process with status 1.
    """
    try:
        trainer.predict(module, loader, return_predictions=False)
    except SystemExit:
        raise KeyboardInterrupt from None


def build_loggers(cfg: DictConfig, resume: Checkpoint | None) -> list[Logger]:
    """Build the selected loggers; in a resumed run they continue after the checkpoint's step."""
    loggers = _build_group(cfg, "logger", Logger)
    for logger in loggers:
        if resume is not None and isinstance(logger, CsvLog):
            logger.keep_until(resume["global_step"])
    return loggers

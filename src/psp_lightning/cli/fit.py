"""The shared part of the training commands: check the run directory, run the fit and report how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from psp_lightning.cli.resume import changed_arithmetic, record, refuse_changes
from psp_lightning.lit.run_folder import LAST, contains_run, last_checkpoint
from psp_lightning.utils.devices import is_restarted
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training


def fit(
    cfg: DictConfig,
    build: Callable[[DictConfig, Path | None], Training],
    announce: Callable[[Training], None],
    command: str,
) -> Training | None:
    """Build a training and run it to its end.

    Args:
        cfg: the composed configuration.
        build: builds the training from the configuration and the checkpoint to resume, if any.
        announce: logs what is about to start; called on rank 0.
        command: name of the command and, with underscores, of its logger.

    Returns:
        The training; None if the checkpoint has reached `trainer.max_steps` already.

    Raises:
        UserError: the directory contains a run, a resume changes fixed settings, or Lightning rejects a setting.
        KeyboardInterrupt: the run was asked to stop; its last checkpoint is written.
    """
    from pytorch_lightning.callbacks import LambdaCallback
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    log = logging.getLogger(command.replace("-", "_"))
    run = Path(cfg.paths.output_dir)
    resume = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    restarted = is_restarted() and HydraConfig.get().mode == RunMode.MULTIRUN
    if resume is None and restarted and (resume := last_checkpoint(run)):  # Slurm repeats a job with the same settings
        cfg.resume = str(resume)
    if resume is None and contains_run(run):
        raise UserError(f"{run} contains a run already. Continue it with resume={run}, or choose another run=NAME.")
    differences = refuse_changes(run, cfg) if resume else []
    training = build(cfg, resume)
    trainer = training.trainer
    if training.resume_step is not None and training.resume_step >= trainer.max_steps:
        log.info("already at step %d; set a larger trainer.max_steps to continue. %s", training.resume_step, resume)
        return None
    if trainer.is_global_zero:
        for line in [*differences, *(changed_arithmetic(run) if resume else [])]:
            log.info("changed on resume: %s", line)
        if resume is not None:  # psp-runs needs the time: the log of a killed part has no last line
            written = datetime.fromtimestamp(resume.stat().st_mtime).isoformat(" ", "milliseconds")
            log.info("resuming at step %d from %s, written %s", training.resume_step, resume, written)
        announce(training)
        # recorded after everything is loaded, so a failed resume leaves the record unchanged
        trainer.callbacks.insert(0, LambdaCallback(on_train_start=lambda *_: record(run, cfg)))  # type: ignore[attr-defined]
    stopped = False
    try:
        trainer.fit(training.module, training.data, ckpt_path=resume)
    except SystemExit:  # Lightning exits this way after SIGTERM and after a second ctrl-C
        stopped = True
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if stopped or training.interrupted:
        if (run / LAST).exists():
            log.info("stopped at step %d; continue with: %s resume=%s", trainer.global_step, command, run)
        raise KeyboardInterrupt
    return training

"""What the training commands share: a run directory that is new or continued, and how a fit ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from psp_lightning.cli.resume import LAST, changed_arithmetic, record, refuse_changes
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training


def fit(
    cfg: DictConfig,
    build: Callable[[DictConfig, Path | None], Training],
    announce: Callable[[Training], None],
    command: str,
    log: logging.Logger,
) -> Training | None:
    """Build a training and run it to its end.

    Args:
        cfg: the composed configuration.
        build: from configuration and checkpoint to the training.
        announce: says what is about to start; called on the first rank.
        command: for the message how to go on.
        log: the command's.

    Returns:
        The training; None where the checkpoint has all steps already.

    Raises:
        UserError: the directory holds a run already, settings changed that make the run, Lightning refuses them.
        KeyboardInterrupt: the run was asked to stop; its last checkpoint is written.
    """
    from pytorch_lightning.callbacks import LambdaCallback
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    run = Path(cfg.paths.output_dir)
    last = run / LAST
    resume = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    if resume is None and last.exists():
        raise UserError(f"{run} holds a run already: go on with resume={run}, or choose another run=NAME.")
    differences = refuse_changes(run, cfg) if resume else []
    training = build(cfg, resume)
    trainer = training.trainer
    if training.resume_step is not None and training.resume_step >= trainer.max_steps:
        log.info("already at step %d; trainer.max_steps=N goes on. %s", training.resume_step, resume)
        return None
    if trainer.is_global_zero:
        for line in [*differences, *(changed_arithmetic(run) if resume else [])]:
            log.info("changed on resume: %s", line)
        announce(training)
        # recorded once everything is loaded: a resume that was refused leaves the record as it was
        trainer.callbacks.insert(0, LambdaCallback(on_train_start=lambda *_: record(run, cfg)))  # type: ignore[attr-defined]
    stopped = False
    try:
        trainer.fit(training.module, training.data, ckpt_path=resume)
    except SystemExit:  # how Lightning ends after SIGTERM, and after ctrl-C twice
        stopped = True
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if stopped or training.interrupted:
        if last.exists():
            log.info("stopped at step %d; go on with: %s resume=%s", trainer.global_step, command, run)
        raise KeyboardInterrupt
    return training

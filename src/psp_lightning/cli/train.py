"""psp-train: compose, build, run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli._main import guard, quote_paths, user_errors
from psp_lightning.cli.launch import launch
from psp_lightning.cli.resume import LAST, record, refuse_changes, with_resume
from psp_lightning.utils.devices import count_devices
from psp_lightning.utils.errors import UserError

log = logging.getLogger("psp_train")


def train_job(cfg: DictConfig) -> float | None:
    """One run in this process, or as one of its ranks; returns the objective."""
    from pytorch_lightning.callbacks import LambdaCallback
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from psp_lightning.build import build_training

    run = Path(cfg.paths.output_dir)
    last = run / LAST
    resume = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    if resume is None and last.exists():
        raise UserError(f"{run} holds a run already: go on with resume={run}, or choose another run=NAME.")
    differences = refuse_changes(run, cfg) if resume else []
    training = build_training(cfg, resume)
    trainer = training.trainer
    if resume is not None and training.resume_step >= trainer.max_steps:
        log.info("already at step %d; trainer.max_steps=N goes on. %s", training.resume_step, resume)
        return None
    if trainer.is_global_zero:
        for line in differences:
            log.info("changed on resume: %s", line)
        if training.untrained_generator:
            log.warning("the generator is seeded and untrained: outputs are no faces; generator=file takes a real one")
        log.info("%s on %s, %d steps; run directory %s", cfg.task.name, cfg.data.name, trainer.max_steps, run)
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
            log.info("stopped at step %d; go on with: psp-train resume=%s", trainer.global_step, run)
        raise KeyboardInterrupt
    value = trainer.callback_metrics.get(cfg.objective)
    if trainer.is_global_zero:
        reached = "" if value is None else f", {cfg.objective} {float(value):.4f}"
        log.info("done: step %d%s; %s", trainer.global_step, reached, last)
    return None if value is None else float(value)


@hydra.main(version_base="1.3", config_path=config_root(), config_name="train")
@user_errors
def _run(cfg: DictConfig) -> Any:
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError("must be given: " + " ".join(f"{key}=..." for key in missing))
    return launch(train_job, cfg, count_devices(cfg.trainer.accelerator, cfg.trainer.devices))


def main() -> None:
    """Entry point of `psp-train`."""

    def run() -> None:
        sys.argv[1:] = with_resume(quote_paths(sys.argv[1:]))
        _run()

    guard(run)


if __name__ == "__main__":
    main()

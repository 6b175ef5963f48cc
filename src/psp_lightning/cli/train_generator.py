"""psp-train-generator: compose, build, run."""

from __future__ import annotations

import logging
import os
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

log = logging.getLogger("psp_train_generator")
OmegaConf.register_new_resolver("psp_conf", config_root, replace=True)


def train_generator_job(cfg: DictConfig) -> None:
    """One run in this process, or as one of its ranks."""
    from pytorch_lightning.callbacks import LambdaCallback
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from psp_lightning.build_generator import build_generator_training

    run = Path(cfg.paths.output_dir)
    last = run / LAST
    resume = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    if resume is None and last.exists():
        raise UserError(f"{run} holds a run already: go on with resume={run}, or choose another run=NAME.")
    differences = refuse_changes(run, cfg) if resume else []
    training = build_generator_training(cfg, resume)
    trainer, module = training.trainer, training.module
    if resume is not None and training.resume_step >= trainer.max_steps:
        log.info("already at step %d; trainer.max_steps=N goes on. %s", training.resume_step, resume)
        return
    if trainer.is_global_zero:
        for line in differences:
            log.info("changed on resume: %s", line)
        log.info(
            "%d px on %s (%d images), %d steps of %d images a device; run directory %s",
            module.generator.output_size, cfg.data.name, len(training.data.images), trainer.max_steps,
            training.data.batch_size, run,
        )  # fmt: skip
        trainer.callbacks.insert(0, LambdaCallback(on_train_start=lambda *_: record(run, cfg)))  # type: ignore[attr-defined]
    stopped = False
    try:
        trainer.fit(module, training.data, ckpt_path=resume)
    except SystemExit:  # how Lightning ends after SIGTERM, and after ctrl-C twice
        stopped = True
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if stopped or training.interrupted:
        if last.exists():
            log.info("stopped at step %d; go on with: psp-train-generator resume=%s", trainer.global_step, run)
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        log.info("done: step %d; %s", trainer.global_step, run / "generator.safetensors")


@hydra.main(
    version_base="1.3",
    config_path=os.path.join(config_root(), "generator_training"),
    config_name="train_generator",
)
@user_errors
def _run(cfg: DictConfig) -> Any:
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError("must be given: " + " ".join(f"{key}=..." for key in missing))
    return launch(train_generator_job, cfg, count_devices(cfg.trainer.accelerator, cfg.trainer.devices))


def main() -> None:
    """Entry point of `psp-train-generator`."""

    def run() -> None:
        sys.argv[1:] = with_resume(quote_paths(sys.argv[1:]), family="generator")
        _run()

    guard(run)


if __name__ == "__main__":
    main()

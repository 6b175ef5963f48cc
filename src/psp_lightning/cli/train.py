"""psp-train: compose, build, run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli._fit import fit
from psp_lightning.cli._main import guard, quote_paths, user_errors
from psp_lightning.cli.launch import launch
from psp_lightning.cli.resume import LAST, with_resume
from psp_lightning.utils.devices import count_devices
from psp_lightning.utils.errors import UserError

log = logging.getLogger("psp_train")


def train_job(cfg: DictConfig) -> float | None:
    """One run in this process, or as one of its ranks; returns the objective."""
    from psp_lightning.build.training import build_training

    run = Path(cfg.paths.output_dir)

    def announce(training: Any) -> None:
        if training.untrained_generator:
            log.warning("the generator is seeded and untrained: outputs are no faces; generator=file takes a real one")
        steps = training.trainer.max_steps
        log.info("%s on %s, %d steps; run directory %s", cfg.task.name, cfg.data.name, steps, run)

    training = fit(cfg, build_training, announce, "psp-train", log)
    if training is None:
        return None
    value = training.trainer.callback_metrics.get(cfg.objective)
    if training.trainer.is_global_zero:
        reached = "" if value is None else f", {cfg.objective} {float(value):.4f}"
        log.info("done: step %d%s; %s", training.trainer.global_step, reached, run / LAST)
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

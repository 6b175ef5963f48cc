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
from psp_lightning.cli._fit import fit
from psp_lightning.cli._main import guard, quote_paths, user_errors
from psp_lightning.cli.launch import launch
from psp_lightning.cli.resume import with_resume
from psp_lightning.utils.devices import count_devices
from psp_lightning.utils.errors import UserError

log = logging.getLogger("psp_train_generator")
OmegaConf.register_new_resolver("psp_conf", config_root, replace=True)


def train_generator_job(cfg: DictConfig) -> None:
    """One run in this process, or as one of its ranks."""
    from psp_lightning.build.generator_training import build_generator_training

    run = Path(cfg.paths.output_dir)

    def announce(training: Any) -> None:
        log.info(
            "%d px on %s (%d images), %d steps of %d images a device; run directory %s",
            training.module.generator.output_size, cfg.data.name, len(training.data.images),
            training.trainer.max_steps, training.data.batch_size, run,
        )  # fmt: skip

    training = fit(cfg, build_generator_training, announce, "psp-train-generator", log)
    if training is not None and training.trainer.is_global_zero:
        log.info("done: step %d; %s", training.trainer.global_step, run / "generator.safetensors")


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

"""psp-train-generator: train a StyleGAN2 generator."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli.claim import claiming_jobs
from psp_lightning.cli.fit import fit
from psp_lightning.cli.help import answer
from psp_lightning.cli.launch import launch
from psp_lightning.cli.mistakes import guard, user_errors
from psp_lightning.cli.resume import with_resume
from psp_lightning.utils.devices import check_launched, count_devices, gpus_of_a_job
from psp_lightning.utils.errors import plural

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training

log = logging.getLogger("psp_train_generator")
OmegaConf.register_new_resolver("psp_conf", config_root, replace=True)
OmegaConf.register_new_resolver("psp_gpus", gpus_of_a_job, replace=True)  # in conf/hydra/launcher


def train_generator_job(cfg: DictConfig) -> None:
    """Run one training, or one rank of it."""
    from psp_lightning.build.generator_training import build_generator_training

    run = cfg.paths.output_dir

    def announce(training: Training) -> None:
        module: Any = training.module
        data: Any = training.data
        log.info(
            "%d px on %s (%s), %s of %s per device; run directory %s", module.generator.output_size, cfg.data.name,
            plural(len(data.images), "image"), plural(training.trainer.max_steps, "step"),
            plural(data.batch_size, "image"), run,
        )  # fmt: skip

    training = fit(cfg, build_generator_training, announce, "psp-train-generator")
    if training is not None and training.trainer.is_global_zero:
        file = os.path.join(run, "generator.safetensors")
        log.info("done: step %d; %s", training.trainer.global_step, file if os.path.exists(file) else run)


@hydra.main(
    version_base="1.3", config_path=os.path.join(config_root(), "generator_training"), config_name="train_generator"
)
@user_errors
@claiming_jobs
def _run(cfg: DictConfig) -> Any:
    n_devices = count_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    check_launched(n_devices, cfg.trainer.num_nodes)
    return launch(train_generator_job, cfg, n_devices)


def main() -> None:
    """Entry point of `psp-train-generator`."""
    answer("psp-train-generator")
    guard(_run, functools.partial(with_resume, config="generator_training/train_generator"))


if __name__ == "__main__":
    from psp_lightning.cli import train_generator  # other processes import what this module is called, not __main__

    train_generator.main()

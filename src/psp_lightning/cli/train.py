"""psp-train: train an encoder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from psp_lightning._conf import config_root
from psp_lightning.cli.fit import fit
from psp_lightning.cli.help import answer
from psp_lightning.cli.launch import launch
from psp_lightning.cli.mistakes import guard, user_errors
from psp_lightning.cli.resume import LAST, with_resume
from psp_lightning.utils.devices import count_devices

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training

log = logging.getLogger("psp_train")


def train_job(cfg: DictConfig) -> float | None:
    """Run one training, or one rank of it; return the objective."""
    from psp_lightning.build.training import build_training

    run = cfg.paths.output_dir

    def announce(training: Training) -> None:
        if str(cfg.generator.get("_target_", "")).endswith("Generator.seeded") and cfg.init_from is None:
            log.warning("the generator is untrained, so its outputs are not faces; generator=file loads a trained one")
        steps = training.trainer.max_steps
        log.info("%s on %s, %d steps; run directory %s", cfg.task.name, cfg.data.name, steps, run)

    training = fit(cfg, build_training, announce, "psp-train")
    if training is None:
        return None
    value = training.trainer.callback_metrics.get(cfg.objective)
    if training.trainer.is_global_zero:
        reached = "" if value is None else f", {cfg.objective} {float(value):.4f}"
        log.info("done: step %d%s; %s/%s", training.trainer.global_step, reached, run, LAST)
    return None if value is None else float(value)


@hydra.main(version_base="1.3", config_path=config_root(), config_name="train")
@user_errors
def _run(cfg: DictConfig) -> Any:
    return launch(train_job, cfg, count_devices(cfg.trainer.accelerator, cfg.trainer.devices))


def main() -> None:
    """Entry point of `psp-train`."""
    answer("psp-train")
    guard(_run, with_resume)


if __name__ == "__main__":
    main()

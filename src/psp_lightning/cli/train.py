"""psp-train: train an encoder."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
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
from psp_lightning.cli.trial import Pruned, TrialPlace, check_search, earlier_result, keep_result
from psp_lightning.lit.run_folder import LAST
from psp_lightning.utils.devices import check_launched, count_devices, gpus_of_a_job
from psp_lightning.utils.errors import plural

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training

log = logging.getLogger("psp_train")
OmegaConf.register_new_resolver("psp_gpus", gpus_of_a_job, replace=True)  # in conf/hydra/launcher


def train_job(cfg: DictConfig, trial: TrialPlace | None = None) -> float | None:
    """Run one training, or one rank of it; return the objective. `trial` may end it early."""
    from psp_lightning.build.doctor import check_first_batch
    from psp_lightning.build.training import build_training, toy_terms
    from psp_lightning.data.datamodules import TaskDataModule
    from psp_lightning.lit.callbacks import Pruning

    run = cfg.paths.output_dir

    def announce(training: Training) -> None:
        if str(cfg.generator.get("_target_", "")).endswith("Generator.seeded") and cfg.init_from is None:
            log.warning("the generator is untrained, so its outputs are not faces; generator=file loads a trained one")
        if terms := toy_terms(cfg):
            log.warning(
                "loss=[%s] compares images with the network of the toy faces, which does not fit other images: choose "
                "domain=ffhq256 (faces) or domain=generic, or set domain.identity=FILE",
                ",".join(terms),
            )
        if isinstance(training.data, TaskDataModule):
            for finding in check_first_batch(training.data):
                log.warning("%s", finding.line())
        steps = training.trainer.max_steps
        log.info("%s on %s, %s; run directory %s", cfg.task.name, cfg.data.name, plural(steps, "step"), run)

    def build(cfg: DictConfig, resume: Path | None) -> Training:
        training = build_training(cfg, resume)
        if pruning is not None:
            training.trainer.callbacks.insert(0, pruning)  # type: ignore[attr-defined]
        return training

    pruning = None if trial is None else Pruning(trial.open, cfg.objective)
    training = fit(cfg, build, announce, "psp-train")
    if training is None:
        return None
    value = training.trainer.callback_metrics.get(cfg.objective)
    pruned = pruning is not None and pruning.pruned
    if training.trainer.is_global_zero:
        reached = "" if value is None else f", {cfg.objective} {float(value):.4f}"
        end = "pruned" if pruned else "done"
        log.info("%s: step %d%s; %s/%s", end, training.trainer.global_step, reached, run, LAST)
    return None if value is None else (Pruned if pruned else float)(value)


@hydra.main(version_base="1.3", config_path=config_root(), config_name="train")
@user_errors
@claiming_jobs
def _run(cfg: DictConfig) -> Any:
    trial = check_search(cfg)
    if (value := earlier_result(cfg)) is not None:
        return value
    n_devices = count_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    check_launched(n_devices, cfg.trainer.num_nodes)
    return keep_result(cfg, launch(functools.partial(train_job, trial=trial), cfg, n_devices))


def main() -> None:
    """Entry point of `psp-train`."""
    answer("psp-train")
    guard(_run, with_resume)


if __name__ == "__main__":
    from psp_lightning.cli import train  # other processes import what this module is called, not __main__

    train.main()

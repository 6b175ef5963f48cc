"""psp-train: train an encoder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from psp_lightning._conf import config_root
from psp_lightning.cli.fit import fit
from psp_lightning.cli.help import answer
from psp_lightning.cli.launch import launch
from psp_lightning.cli.mistakes import fail, guard, user_errors
from psp_lightning.cli.resume import with_resume
from psp_lightning.lit.run_folder import LAST
from psp_lightning.utils.devices import check_launched, count_devices
from psp_lightning.utils.errors import UserError, plural

if TYPE_CHECKING:
    from psp_lightning.build.trainer import Training

log = logging.getLogger("psp_train")


def train_job(cfg: DictConfig) -> float | None:
    """Run one training, or one rank of it; return the objective."""
    from psp_lightning.build.doctor import check_first_batch
    from psp_lightning.build.training import build_training, toy_terms
    from psp_lightning.data.datamodules import TaskDataModule

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
    _check_search(cfg)
    n_devices = count_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    check_launched(n_devices, cfg.trainer.num_nodes)
    return launch(train_job, cfg, n_devices)


def _check_search(cfg: DictConfig) -> None:
    """End a search whose trials would not measure the objective. A plain sweep needs no objective."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or str(hydra.sweeper.get("_target_")).endswith("BasicSweeper"):
        return
    if cfg.objective is None:
        fail("a search needs an objective=NAME, such as val/loss.")
    if not cfg.trainer.limit_val_batches or cfg.trainer.val_every > cfg.trainer.max_steps:
        fail(
            f"objective={cfg.objective} would not be measured, because there is no validation: trainer.val_every="
            f"{cfg.trainer.val_every}, trainer.max_steps={cfg.trainer.max_steps}, trainer.limit_val_batches="
            f"{cfg.trainer.limit_val_batches}. Set trainer.val_every={cfg.trainer.max_steps} or less."
        )


def _run_or_search() -> None:
    try:
        _run()
    except ValueError as error:
        if "No trials are completed yet" not in str(error):  # Optuna's message
            raise
        raise UserError("no trial of the search was completed; the log above names the reason for each.") from None


def main() -> None:
    """Entry point of `psp-train`."""
    answer("psp-train")
    guard(_run_or_search, with_resume)


if __name__ == "__main__":
    main()

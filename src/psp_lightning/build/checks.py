"""Checks of settings before anything is built or any step is made."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

from psp_lightning.lit.psp import LitPSP
from psp_lightning.utils.errors import UserError, suggest

NUMBERS: dict[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**32 - 1),
    "optimizer.lr": (float, 0, math.inf),
    "trainer.max_steps": (int, 1, math.inf),
    "trainer.val_every": (int, 1, math.inf),
    "trainer.log_every_n_steps": (int, 1, math.inf),
    "trainer.accumulate_grad_batches": (int, 1, math.inf),
    "data.batch_size": (int, 1, math.inf),
    "data.val_batch_size": (int, 1, math.inf),
    "data.num_workers": (int, 0, 1024),
    "data.limit": (int, 1, math.inf),
    "data.val_share": (float, 0, 1),
    "callbacks.last.every_n_steps": (int, 1, math.inf),
    "callbacks.every.every_n_steps": (int, 1, math.inf),
    "callbacks.images.every_n_steps": (int, 0, math.inf),
    "callbacks.images.n_images": (int, 1, math.inf),
    "model.warmup_steps": (int, 0, math.inf),
    "model.decay_steps": (int, 0, math.inf),
    "model.latent_avg_samples": (int, 1, math.inf),
}


def check_numbers(cfg: DictConfig, table: dict[str, tuple[type, float, float]]) -> None:
    """Refuse numbers that make no sense, before anything is built.

    Args:
        cfg: the composed configuration; null and keys that are not there are left to their defaults.
        table: key to (int or float, smallest, largest).

    Raises:
        UserError: naming the key, its value and the range.
    """
    for key, (kind, low, high) in table.items():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (kind is int and value != int(value)) or not low <= value <= high:
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{key}={value} must be a {'whole ' if kind is int else ''}number, {limits}.")
        if kind is int and isinstance(value, float):  # 1e4, 16.0: what takes it wants an int
            OmegaConf.update(cfg, key, int(value))


def check_monitored(cfg: DictConfig, module: LitPSP) -> None:
    """Refuse a monitored value that will never be logged; the first validation may be hours away.

    Raises:
        UserError: naming the key and the logged values.
    """
    terms = list(module.losses.terms)
    logged = ["val/loss", *(f"val/loss_{name}" for name in terms), *(f"val/{name}" for name in module.val_metrics)]
    best = cfg.callbacks.get("best")
    for key, value in {"callbacks.best.monitor": best and best.monitor, "objective": cfg.objective}.items():
        extra = any(str(value).startswith(f"val/{name}_") for name in terms)  # a term's own logs
        if value is not None and value not in logged and not extra:
            raise UserError(f"{key}={value} is not logged.{suggest(value, logged)} Logged: {', '.join(logged)}")
    if best and best.mode not in ("min", "max"):
        raise UserError(f"callbacks.best.mode={best.mode} is unknown: min or max.")

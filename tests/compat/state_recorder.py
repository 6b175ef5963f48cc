"""A callback that records the state a training run starts from and the samples it sees, without the library's names.

Tensors are compared by digests of their values, and each optimizer state is recorded with the parameter it belongs to.
A renamed module therefore changes nothing here, but a single swapped or rounded value does.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


def digest(tensor: torch.Tensor) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of dtype, shape and values."""
    values = tensor.detach().cpu().contiguous()
    head = f"{values.dtype} {tuple(values.shape)} ".encode()
    return hashlib.sha256(head + values.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def digests(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the sorted digests of all tensors of a state dict."""
    return sorted(digest(tensor) for tensor in state.values())


def digest_text(value: Any) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of the value's `repr`."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the sorted digests of each parameter with its state, and the numbers of the groups."""
    parameters, groups = [], []
    for group in optimizer.param_groups:
        groups.append({key: value for key, value in group.items() if isinstance(value, int | float | tuple)})
        for p in group["params"]:
            state = sorted((key, digest(torch.as_tensor(value))) for key, value in optimizer.state[p].items())
            parameters.append(f"{digest(p)} {digest_text(state)}")
    return {"parameters": sorted(parameters), "groups": groups}


def random_states() -> dict[str, str]:
    """Return digests of the states of the three random number generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": digest_text(random.getstate()),
        "numpy": digest_text([str(name), np.asarray(keys).tolist(), *rest]),
        "torch": digest(torch.get_rng_state()),
    }


class Recorder(pl.Callback):
    """Write a JSON file with the state before the first step and the paths of every step's batch.

    Args:
        path: path of the JSON file, which is rewritten at every step.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        if not self.record:
            scores = [getattr(callback, "best_model_score", None) for callback in trainer.checkpoint_callbacks]
            self.record = {
                "step": trainer.global_step,
                "place": [trainer.current_epoch, i],
                "weights": digests(pl_module.state_dict()),
                "optimizers": [optimizer_state(optimizer) for optimizer in trainer.optimizers],
                "rates": [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs],
                "random": random_states(),
                "best": [float(score) for score in scores if score is not None],
                "order": {},
            }
        self.record["order"][str(trainer.global_step + 1)] = list(batch["path"])
        self.path.write_text(json.dumps(self.record))

"""Random numbers of a step, which depend only on (seed, step, purpose), and the random states of a process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class StepRNG:
    """Random numbers for one purpose in one step.

    Every rank draws the numbers of the whole batch and keeps every `world`-th row from its own on: n ranks together see
    what one rank with the whole batch sees, and a resumed run draws what the interrupted one would have drawn.

    Args:
        seed: of the run.
        step: number of the step.
        purpose: another number gives other random numbers.
        rank, world: this process and their number.
        device: where the numbers are drawn; devices of different kinds draw different ones.
    """

    def __init__(
        self, seed: int, step: int, purpose: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.rank, self.world, self.device = rank, world, torch.device(device)
        state = int(np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator(self.device).manual_seed(state)

    def normal(self, n: int, *shape: int) -> Tensor:
        """Return float32 (n, *shape), standard normal: the n rows of this rank."""
        rows = torch.randn(n * self.world, *shape, generator=self.generator, device=self.device)
        return rows[self.rank :: self.world]

    def uniform(self, n: int, *shape: int) -> Tensor:
        """Return float32 (n, *shape), uniform in [0, 1): the n rows of this rank."""
        rows = torch.rand(n * self.world, *shape, generator=self.generator, device=self.device)
        return rows[self.rank :: self.world]


def capture() -> dict[str, Any]:
    """Return the states of python, numpy, torch and the current CUDA device, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the states that `capture` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def offset(rank: int) -> None:
    """Give this rank torch streams of its own; all ranks started from the same seed."""
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)

"""Random numbers that depend only on (seed, step, purpose), and saving and restoring random states."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class StepRNG:
    """Random numbers for one purpose in one step.

    Every rank draws numbers for the whole batch and keeps every `world`-th row, starting at its rank. So n ranks
    together see the same numbers as one rank with the whole batch, and a resumed run draws the same numbers as an
    uninterrupted one. Different `purpose` numbers give independent streams. Different kinds of devices draw different
    numbers.
    """

    def __init__(
        self, seed: int, step: int, purpose: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.rank, self.world, self.device = rank, world, torch.device(device)
        state = int(np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator = torch.Generator(self.device).manual_seed(state)

    def normal(self, n: int, *shape: int) -> Tensor:
        """Return this rank's n rows of standard normal numbers, float32 (n, *shape)."""
        rows = torch.randn(n * self.world, *shape, generator=self.generator, device=self.device)
        return rows[self.rank :: self.world]

    def uniform(self, n: int, *shape: int) -> Tensor:
        """Return this rank's n rows of uniform numbers in [0, 1), float32 (n, *shape)."""
        rows = torch.rand(n * self.world, *shape, generator=self.generator, device=self.device)
        return rows[self.rank :: self.world]


def capture() -> dict[str, Any]:
    """Return the random states of python, numpy, torch and the current CUDA device, as tensors and plain values."""
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
    """Restore the states that `capture` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def offset(rank: int) -> None:
    """Give this rank its own torch streams; all ranks start from the same seed."""
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)

"""Random numbers of a training step that depend on (seed, step, purpose) alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Random numbers for one purpose in one step.

    Every rank draws the numbers of the whole batch and keeps every `world`-th row from its own: n ranks see together
    what one rank with the whole batch sees, and a resumed run draws what the interrupted one would have drawn.

    Args:
        seed: of the run.
        step: number of the step.
        purpose: another number, other draws.
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
        """float32 (n, *shape), standard normal; n rows of this rank."""
        every = torch.randn(n * self.world, *shape, generator=self.generator, device=self.device)
        return every[self.rank :: self.world]

    def uniform(self, n: int, *shape: int) -> Tensor:
        """float32 (n, *shape), uniform in [0, 1); n rows of this rank."""
        every = torch.rand(n * self.world, *shape, generator=self.generator, device=self.device)
        return every[self.rank :: self.world]

"""LitE4E: train an encoder whose codes stay editable, as e4e does.

Source: Tov et al., e4e (arXiv:2102.02766); the numbers and the order of the steps follow its code, commit 99ea505.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from psp_lightning.lit.distributed import average_over_ranks, broadcast, gather_rows
from psp_lightning.lit.psp import LitPSP
from psp_lightning.lit.rng import StepRNG
from psp_lightning.losses import adversarial
from psp_lightning.losses.base import LossInputs, full_precision
from psp_lightning.models.discriminator import LatentDiscriminator
from psp_lightning.models.encoders import StagedEncoder
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.errors import UserError

CODES, STYLES, REAL_POOL, FAKE_POOL = range(10, 14)  # purposes of random numbers, see `StepRNG`


@dataclass(frozen=True)
class E4E:
    """What e4e's training adds to pSp's; the defaults are the published values.

    Attributes:
        start: optimizer steps before the second style may differ from the first.
        every: optimizer steps after which one more style may differ.
        delta_weight: weight of the norms of the differences in the encoder's objective.
        adversarial_weight: weight of the discriminator's loss in the encoder's objective; 0: no discriminator.
        discriminator_lr: learning rate of the discriminator's Adam.
        r1_gamma: weight of R1.
        r1_every: batches between two steps of R1, each with `r1_every` times its weight; 0: never.
        pool: number of earlier codes of the mapping, and of the encoder, that the discriminator also sees; 0: none.

    Raises:
        ArgumentError: a number is out of range.
    """

    start: int = 20_000
    every: int = 2_000
    delta_weight: float = 2e-4
    adversarial_weight: float = 0.1
    discriminator_lr: float = 2e-5
    r1_gamma: float = 10.0
    r1_every: int = 16
    pool: int = 50

    def __post_init__(self) -> None:
        for name, low in {"start": 0, "every": 1, "r1_every": 0, "pool": 0}.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), low))  # 1e4 becomes an int
        for name in ("delta_weight", "adversarial_weight", "discriminator_lr", "r1_gamma"):
            number(name, getattr(self, name), 0)

    def differences(self, step: int, n_styles: int) -> int:
        """Return how many styles may differ from the first in the step after `step` finished ones."""
        return 0 if step < self.start else min(n_styles - 1, 1 + (step - self.start) // self.every)


class CodePool:
    """Earlier codes that the discriminator sees in addition to the newest, so that it does not forget them.

    Args:
        size: number of codes; 0: `exchange` returns its argument.

    Source: Shrivastava et al. (arXiv:1612.07828), section 2.3, in the form of e4e's code.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.codes: list[Tensor] = []

    def exchange(self, codes: Tensor, draws: Tensor) -> Tensor:
        """Mix new codes with those in the pool, and return as many, (n, style_dim).

        Until the pool is full, each code is stored and returned. After that, each code is returned unchanged or
        replaces a random code of the pool, which is returned instead, with equal probability.

        Args:
            codes: (n, style_dim), without a graph.
            draws: (n, 2) on the CPU, uniform in [0, 1): whether a code goes into the pool, and which one it replaces.
        """
        if not self.size:
            return codes
        result = []
        for code, (chance, place) in zip(codes, draws.tolist(), strict=True):
            if len(self.codes) < self.size:
                self.codes.append(code)
            elif chance > 0.5:
                index = int(place * self.size)
                self.codes[index], code = code, self.codes[index]
            result.append(code)
        return torch.stack(result)


class LatentCritic:
    """The discriminator of single styles with its optimizer and its pools.

    It is not a module, which keeps it out of the network's state dict and of DistributedDataParallel. `step` averages
    its gradients over the ranks.
    """

    def __init__(self, recipe: E4E, style_dim: int) -> None:
        self.recipe = recipe
        self.network = LatentDiscriminator(style_dim)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.discriminator_lr)
        self.real, self.fake = CodePool(recipe.pool), CodePool(recipe.pool)
        self.steps = 0
        self.r1 = torch.zeros(())

    def step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Update the discriminator with real codes and codes of the encoder, (n, style_dim); return what to log."""
        self.network.requires_grad_(True)
        loss = adversarial.discriminator_loss(self.network(real), self.network(fake))
        self._descend(loss)
        recipe = self.recipe
        if recipe.r1_every and self.steps % recipe.r1_every == 0:
            real = real.detach().requires_grad_()
            scores = self.network(real)
            penalty = adversarial.r1_penalty(scores, real)
            # with a gradient of 0 instead of none, Adam moves the biases as in the published code
            self._descend(penalty * (recipe.r1_gamma / 2 * recipe.r1_every) + 0 * scores.sum())
            self.r1 = penalty.detach()
        self.network.requires_grad_(False)
        self.steps += 1
        return {"loss_discriminator": loss.detach(), "r1": self.r1}

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        average_over_ranks(p.grad for p in self.network.parameters() if p.grad is not None)
        self.optimizer.step()

    def start(self, device: torch.device, state: Mapping[str, Any] | None) -> None:
        """Move to `device` and load what `state` returned in an earlier run, or else take the weights of rank 0."""
        self.network.to(device)
        if state is not None:
            self.network.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.real.codes, self.fake.codes = (list(state[pool].to(device)) for pool in ("real_pool", "fake_pool"))
            self.steps, self.r1 = state["steps"], torch.tensor(state["r1"], device=device)
        else:
            broadcast(self.network.parameters())

    def state(self) -> dict[str, Any]:
        """Return what `start` needs to continue, as tensors and plain values."""
        pools = {"real_pool": self.real.codes, "fake_pool": self.fake.codes}
        return {
            "discriminator": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: torch.stack(codes) if codes else torch.empty(0) for name, codes in pools.items()},
            "steps": self.steps,
            "r1": float(self.r1),
        }


class LitE4E(LitPSP):
    """Trains as `LitPSP` does, and keeps the codes of the encoder close to the codes of the generator's mapping.

    Three things are added to a training step; validation and its logged values are the same as in `LitPSP`:

    - Stages: at first, the encoder predicts one style for all layers. Later, one style after the other may differ from
      it. A checkpoint's encoder predicts as many differences as have been trained.
    - A discriminator of single styles learns to tell the mapping's codes from the encoder's, and the encoder learns to
      deceive it. With `loss_per_pass`, the discriminator is updated once per step, with the codes of the first pass.
    - The norms of the differences from the first style are a loss.

    It also logs `train/loss_adversarial`, `train/loss_delta`, `train/loss_discriminator`, `train/r1` (the last penalty,
    without its weight) and `train/differences`. The random numbers of these parts depend only on (seed, step).

    Args:
        *args, **options: see `LitPSP`.
        recipe: the hyperparameters.
        seed: seed of the discriminator's random codes and of the pools.

    Raises:
        UserError: the encoder does not predict differences, or the network has a refiner.
    """

    def __init__(self, *args: Any, recipe: E4E | None = None, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        encoder = self.net.encoder
        if not isinstance(encoder, StagedEncoder):
            raise UserError(
                f"e4e's training needs an encoder that predicts differences from its first style, but "
                f"{type(encoder).__name__} does not. Choose encoder=e4e, e4e_small or restyle_e4e."
            )
        if self.net.refiner is not None:
            raise UserError("e4e's training cannot train a refiner. Train it afterwards, in a new run (init_from=RUN).")
        self.recipe, self.seed = recipe or E4E(), seed
        self.critic = LatentCritic(self.recipe, self.net.style_dim)
        self._first_pass = False
        self._last: dict[str, Tensor] = {}
        self._saved: dict[str, Any] | None = None

    @property
    def encoder(self) -> StagedEncoder:
        """The encoder of the network."""
        return cast(StagedEncoder, self.net.encoder)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.critic.start(self.device, self._saved)
        self._saved = None
        full = self.recipe.start + (self.net.n_styles - 2) * self.recipe.every
        if 0 < (self.total_steps or self.trainer.max_steps) <= full:
            rank_zero_warn(
                f"the run ends before all styles may differ: the last difference is trained from step {full + 1} on. "
                "Lower editability.start and editability.every, or increase trainer.max_steps."
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        self.encoder.differences = self.recipe.differences(self.global_step, self.net.n_styles)
        self._first_pass = True
        return super().training_step(batch, batch_idx)

    def objective(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        total, values = super().objective(inputs)
        if not self.training:
            return total, values
        assert inputs.w_plus is not None
        recipe, extra = self.recipe, {}
        with full_precision(self.device):
            styles = inputs.w_plus.float()[:, : 1 + self.encoder.differences]  # the others are equal to the first
            if recipe.adversarial_weight:
                if self._first_pass:
                    self._last = self._train_critic(styles.detach())
                # the mean over styles of the means over the batch
                deception = adversarial.generator_loss(self.critic.network(styles.flatten(0, 1)))
                total = total + recipe.adversarial_weight * deception
                extra = {"loss_adversarial": deception.detach(), **self._last}
            norms = torch.linalg.vector_norm(styles[:, 1:] - styles[:, :1], dim=2)  # (B, differences)
            delta = norms.mean(0).sum()
            total = total + recipe.delta_weight * delta
        self._first_pass = False
        extra |= {"loss_delta": delta.detach(), "differences": torch.tensor(float(self.encoder.differences))}
        return total, {**values, **extra}

    @torch.no_grad()
    def _train_critic(self, styles: Tensor) -> dict[str, Tensor]:
        """Update the discriminator with one style of each code of the encoder, (B, differences + 1, style_dim)."""
        generator, n = self.net.generator, len(styles)
        real = generator.mapping(self._draws(CODES, self.device).normal(n, generator.z_dim)).float()
        chosen = (self._draws(STYLES).uniform(n) * styles.shape[1]).long()
        fake = styles[torch.arange(n, device=self.device), chosen.to(self.device)]
        real = self._exchange(self.critic.real, real, REAL_POOL)
        fake = self._exchange(self.critic.fake, fake, FAKE_POOL)
        with torch.enable_grad():
            return self.critic.step(real, fake)

    def _exchange(self, pool: CodePool, codes: Tensor, purpose: int) -> Tensor:
        """Exchange codes with a pool, which is the same on all ranks and sees the codes of all."""
        everyone = gather_rows(codes)
        draws = StepRNG(self.seed, self.critic.steps, purpose).uniform(len(everyone), 2)
        return pool.exchange(everyone, draws)[self.trainer.global_rank :: self.trainer.world_size]

    def _draws(self, purpose: int, device: torch.device | str = "cpu") -> StepRNG:
        trainer = self.trainer
        return StepRNG(self.seed, self.critic.steps, purpose, trainer.global_rank, trainer.world_size, device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["e4e"] = self.critic.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "e4e" not in checkpoint:
            raise UserError("the checkpoint has no discriminator: e4e's training did not write it. Start a new run.")
        self._saved = checkpoint["e4e"]

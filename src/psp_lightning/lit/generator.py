"""LitGenerator: train a StyleGAN2 generator against a discriminator."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from psp_lightning.data.augment import augment
from psp_lightning.lit.distributed import average_over_ranks, mean_over_ranks
from psp_lightning.lit.rng import StepRNG
from psp_lightning.losses import adversarial
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.layers import HalfPrecision, freeze
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.arguments import ArgumentError, choice, number, whole
from psp_lightning.utils.compat import rename_state
from psp_lightning.utils.errors import UserError

FAKE, PATH, REAL, PENALTY = range(4)  # purposes of random numbers, see `StepRNG`


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training; the defaults are the published values.

    Attributes:
        r1_gamma: weight of R1; None: `0.0002 * size^2 / batch`, StyleGAN2-ADA's heuristic, with the batch of all
            devices.
        r1_every, path_every: steps between two regularisations (0: never).
        path_weight, path_decay: weight of the path-length penalty, and decay of the mean length.
        path_shrink: factor by which the batch of the path-length penalty is smaller.
        mixing: probability that an image switches to a second style at a random layer.
        ema_images: half-life of the averaged weights in images; None: 10000 / 32 for each image of a batch.
        ema_ramp: upper limit of the half-life, as a fraction of the images shown so far; 0: no limit.
        augment: `none`, `fixed` or `ada`.
        augment_p: probability of each transformation (`fixed`), or its initial value (`ada`).
        ada_target: the value at which `ada` keeps the fraction of real images with a positive score minus the fraction
            with a negative one.
        ada_images: images over which p can change from 0 to 1.
        ada_every: steps between two changes of p.
    """

    r1_gamma: float | None = None
    r1_every: int = 16
    path_weight: float = 2.0
    path_every: int = 4
    path_decay: float = 0.01
    path_shrink: int = 2
    mixing: float = 0.9
    ema_images: float | None = None
    ema_ramp: float = 0.05
    augment: str = "ada"
    augment_p: float = 0.0
    ada_target: float = 0.6
    ada_images: float = 500_000
    ada_every: int = 4

    def __post_init__(self) -> None:
        choice("augment", self.augment, ("none", "fixed", "ada"))
        for name, low in {"r1_every": 0, "path_every": 0, "path_shrink": 1, "ada_every": 1}.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), low))  # 1e4 becomes an int
        for name in ("mixing", "augment_p", "path_decay"):
            number(name, getattr(self, name), 0, 1)
        for name in ("r1_gamma", "ema_images"):
            number(name, getattr(self, name), 0, optional=True)
        number("path_weight", self.path_weight, 0)
        number("ema_ramp", self.ema_ramp, 0)
        number("ada_target", self.ada_target, -1, 1)
        number("ada_images", self.ada_images, 1)


class LitGenerator(pl.LightningModule):
    """Trains `generator` and `discriminator` alternately; each global step updates both.

    Every `log_every` steps it logs `train/loss_g`, `train/loss_d`, `train/score_real`, `train/score_fake`, `train/r1`,
    `train/path_length`, `train/path_penalty`, `train/augment_p`, `train/ada_sign`, `train/images` (shown so far) and
    `train/images_per_second`. With several devices, it logs their mean. A shorter run logs its last step.

    On a CPU, both penalties are computed in full precision even if the networks use half precision.

    All random numbers depend only on (seed, step), see `StepRNG`. Therefore n devices agree with one, and a resumed run
    agrees with an uninterrupted one. This class averages the gradients over devices, because DistributedDataParallel
    does not support double backward through part of a network.

    Args:
        generator, discriminator: networks of the same size.
        lr, betas: Adam's settings before the correction for lazy regularisation; betas from 0 to below 1.
        recipe: all other hyperparameters.
        seed: seed of the random numbers.
        log_every: steps between two rows of the log.

    Raises:
        UserError: the sizes of the networks differ, or `lr` or `betas` is out of range.

    Source: Karras et al., StyleGAN2 (arXiv:1912.04958), appendix B; StyleGAN2-ADA (arXiv:2006.06676), section 3.
    """

    path_mean: Tensor
    augment_p: Tensor
    sign_sum: Tensor
    sign_count: Tensor
    images_shown: Tensor

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        *,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.0, 0.99),
        recipe: Recipe | None = None,
        seed: int = 0,
        log_every: int = 10,
    ) -> None:
        super().__init__()
        if generator.output_size != discriminator.input_size:
            raise UserError(
                f"The generator makes {generator.output_size} px images, the discriminator takes "
                f"{discriminator.input_size} px."
            )
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.g_ema = freeze(copy.deepcopy(generator))
        self.recipe = recipe or Recipe()
        if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
            raise ArgumentError("betas", list(betas), "must be two numbers from 0 to below 1.")
        self.lr, self.betas, self.seed, self.log_every = number("lr", lr, 0), betas, seed, log_every
        for name in ("path_mean", "sign_sum", "sign_count"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("augment_p", torch.tensor(0.0 if self.recipe.augment == "none" else self.recipe.augment_p))
        self.register_buffer("images_shown", torch.zeros((), dtype=torch.int64))  # float32 counts only to 16 million
        self._step, self._p, self._sign = 0, 0.0, 0.0
        self._row: dict[str, Tensor] = {}
        self._clock = (0.0, 0)
        self.train()

    # --- steps

    def draws(self, purpose: int) -> StepRNG:
        """Return this step's random numbers for one purpose."""
        trainer = self._trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return StepRNG(self.seed, self._step, purpose, rank, world, self.device)

    def styles(self, n: int, draws: StepRNG) -> Tensor:
        """Return mapped latents (n, n_styles, style_dim), some with mixed styles.

        Source: StyleGAN (arXiv:1812.04948), section 3.1.
        """
        g = self.generator
        w = g.mapping(draws.normal(n, g.z_dim))  # (n, style_dim)
        w_plus = w[:, None].expand(-1, g.n_styles, -1)
        if self.recipe.mixing <= 0:
            return w_plus
        other = g.mapping(draws.normal(n, g.z_dim))[:, None]
        first = (draws.uniform(n) * (g.n_styles - 1)).floor() + 1  # 1 to n_styles - 1
        first = torch.where(draws.uniform(n) < self.recipe.mixing, first, torch.full_like(first, g.n_styles))
        layer = torch.arange(g.n_styles, device=first.device)
        return torch.where((layer >= first[:, None])[..., None], other, w_plus)

    def render(self, w_plus: Tensor, draws: StepRNG) -> Tensor:
        """Return images (B, C, S, S) with new noise."""
        noise = [draws.normal(len(w_plus), 1, side, side) for side in self.generator.noise_sides()]
        return self.generator.synthesis(w_plus, noise)

    def scores(self, images: Tensor, draws: StepRNG) -> Tensor:
        """Augment images and return the discriminator's scores (B,)."""
        return self.discriminator(augment(images, self._p, draws))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        recipe, real = self.recipe, batch["image"].to(memory_format=torch.channels_last)
        n, world = len(real), self.trainer.world_size
        self._step = self.trainer.global_step
        self._p = float(self.augment_p)
        counted, optimizer_d = self.optimizers()  # type: ignore[misc, attr-defined]
        optimizer_g = counted.optimizer
        row: dict[str, Tensor] = {}

        self._train_only(self.generator)
        draws = self.draws(FAKE)
        fake = self.render(self.styles(n, draws), draws)
        fake_scores = self.scores(fake, draws)
        row["loss_g"] = adversarial.generator_loss(fake_scores)
        # Lightning counts the steps of its wrapper, which only this update uses: one global step per update of both
        self._descend(counted, self.generator, row["loss_g"])
        if recipe.path_every and self._step % recipe.path_every == 0:
            row |= self._path_step(max(1, n // recipe.path_shrink), optimizer_g)

        self._train_only(self.discriminator)
        draws = self.draws(REAL)
        with torch.no_grad():
            fake = self.render(self.styles(n, draws), draws)
        fake_scores = self.scores(fake, draws)
        real_scores = self.scores(real, draws)
        row["loss_d"] = adversarial.discriminator_loss(real_scores, fake_scores)
        self._descend(optimizer_d.optimizer, self.discriminator, row["loss_d"])
        if recipe.r1_every and self._step % recipe.r1_every == 0:
            row |= self._r1_step(real, optimizer_d.optimizer)

        self._refuse_non_finite(row, batch)
        self.images_shown += n * world
        self._update_ema(n * world)
        self._adapt(real_scores.detach(), n * world)
        row |= {"score_real": real_scores.mean(), "score_fake": fake_scores.mean()}
        self._row |= {key: value.detach() for key, value in row.items()}  # keeps the last penalties
        self.log_dict({f"train/{k}": v for k, v in self._row.items()}, prog_bar=True, logger=False)

    def _path_step(self, n: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        recipe, draws = self.recipe, self.draws(PATH)
        w_plus = self.styles(n, draws).contiguous()
        with self._penalty_precision(self.generator):
            images = self.render(w_plus, draws)
            lengths = adversarial.path_lengths(images, w_plus, draws.normal(n, *images.shape[1:]))
        mean = mean_over_ranks(lengths.detach().mean())
        self.path_mean.lerp_(mean, recipe.path_decay)
        penalty = (lengths - self.path_mean).square().mean()
        self._descend(optimizer, self.generator, penalty * (recipe.path_weight * recipe.path_every))
        return {"path_length": mean, "path_penalty": mean_over_ranks(penalty.detach())}

    def _r1_step(self, real: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        recipe, n, size = self.recipe, len(real) * self.trainer.world_size, self.generator.output_size
        images = real.detach().requires_grad_()
        with self._penalty_precision(self.discriminator):
            penalty = adversarial.r1_penalty(self.scores(images, self.draws(PENALTY)), images)
        gamma = 0.0002 * size**2 / n if recipe.r1_gamma is None else recipe.r1_gamma
        self._descend(optimizer, self.discriminator, penalty * (gamma / 2 * recipe.r1_every))
        return {"r1": mean_over_ranks(penalty.detach())}

    def _penalty_precision(self, network: HalfPrecision) -> AbstractContextManager[None]:
        """Return the context for a penalty on a gradient: full precision on a CPU.

        Differentiating the gradient of a 3x3 convolution takes a convolution whose kernel is as large as an image and
        whose channels are the batch. On processors with AMX, PyTorch computes it wrongly in bfloat16 (seen in 2.15:
        relative error 1).
        """
        return network.full_precision() if self.device.type == "cpu" else nullcontext()

    def _train_only(self, network: nn.Module) -> None:
        self.generator.requires_grad_(network is self.generator)
        self.discriminator.requires_grad_(network is self.discriminator)

    def _descend(self, optimizer: Any, network: nn.Module, loss: Tensor) -> None:
        """Make one step of `optimizer` with the gradients of `loss`, averaged over ranks."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_over_ranks(p.grad for p in network.parameters() if p.grad is not None)
        optimizer.step()

    @torch.no_grad()
    def _update_ema(self, batch: int) -> None:
        """Update the exponential moving average of the generator's weights.

        Source: StyleGAN2-ADA (arXiv:2006.06676), appendix: a half-life in images, limited to a fraction of those shown.
        """
        recipe = self.recipe
        half_life = batch * 10_000 / 32 if recipe.ema_images is None else recipe.ema_images
        if recipe.ema_ramp > 0:
            half_life = min(half_life, float(self.images_shown) * recipe.ema_ramp)
        keep = 0.5 ** (batch / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.g_ema.parameters()), list(self.generator.parameters()), 1 - keep)
        for mine, new in zip(self.g_ema.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(new)

    def _adapt(self, real_scores: Tensor, batch: int) -> None:
        """Adapt the augmentation: increase it when the discriminator overfits.

        Source: StyleGAN2-ADA (arXiv:2006.06676), section 3, the heuristic r_t.
        """
        recipe = self.recipe
        self.sign_sum += mean_over_ranks(real_scores.sign().mean())
        self.sign_count += 1
        if (self._step + 1) % recipe.ada_every:
            return
        sign = self.sign_sum / self.sign_count
        self._sign = float(sign)
        if recipe.augment == "ada":
            change = (sign - recipe.ada_target).sign() * (batch * recipe.ada_every / recipe.ada_images)
            self.augment_p.add_(change).clamp_(0, 1)
        self.sign_sum.zero_()
        self.sign_count.zero_()

    # --- log

    def on_train_start(self) -> None:
        self._clock = (time.monotonic(), int(self.images_shown))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self._step + 1
        if step % self.log_every and not step == self.trainer.max_steps < self.log_every:
            return
        now, shown = time.monotonic(), int(self.images_shown)
        rate = (shown - self._clock[1]) / (now - self._clock[0])
        self._clock = (now, shown)
        self.log("train/images_per_second", rate, prog_bar=True, logger=False)
        values = mean_over_ranks(torch.stack([value.float() for value in self._row.values()]))
        row = dict(zip((f"train/{key}" for key in self._row), values.tolist(), strict=True))
        row |= {"train/augment_p": self._p, "train/ada_sign": self._sign, "train/images": shown}
        for logger in self.loggers:
            logger.log_metrics({**row, "train/images_per_second": rate}, step=step)
            logger.save()  # write to disk at once, so that the run can be watched

    def _refuse_non_finite(self, row: dict[str, Tensor], batch: dict[str, Any]) -> None:
        if torch.isfinite(torch.stack([value.detach().float() for value in row.values()])).all():
            return
        name = next(key for key, value in row.items() if not torch.isfinite(value))
        raise UserError(
            f"'{name}' became {float(row[name].detach())} at step {self._step + 1}. Files of the batch: "
            f"{', '.join(map(str, batch['path'][:4]))}, ... Earlier checkpoints are valid. Check "
            "these files, or start a new run from its weights with init_from=RUN, and lower optimizer.lr or raise "
            "model.r1_gamma."
        )

    # --- optimizers, checkpoints

    def configure_optimizers(self) -> Any:
        result = []
        for network, every in ((self.generator, self.recipe.path_every), (self.discriminator, self.recipe.r1_every)):
            # correct for the additional regularisation step after every k-th step: StyleGAN2, appendix B
            ratio = every / (every + 1) if every else 1.0
            betas = tuple(beta**ratio for beta in self.betas)
            result.append(torch.optim.Adam(network.parameters(), lr=self.lr * ratio, betas=betas, eps=1e-8))  # type: ignore[arg-type]
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load `state_dict` strictly.

        Raises:
            UserError: the weights belong to other networks.
        """
        try:
            return super().load_state_dict(rename_state(state_dict), strict=True, assign=assign)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:3]]
            raise UserError(f"The checkpoint's networks do not match network.* and domain.size: {lines}") from None

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load the networks from a checkpoint's state dict, without its counters and statistics.

        Raises:
            UserError: the weights belong to other networks.
        """
        mine = self.state_dict()
        networks = ("generator.", "discriminator.", "g_ema.")
        self.load_state_dict({**mine, **{k: v for k, v in rename_state(state).items() if k.startswith(networks)}})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise a UserError if weights are not finite, before the previous checkpoint is replaced."""
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"The weights '{name}' are not finite after step {self._step + 1}; no checkpoint was written and "
                    "the previous one is intact. Start a new run from its weights with init_from=RUN, and lower "
                    "optimizer.lr or raise model.r1_gamma."
                )
        checkpoint["generator"] = dict(self.generator.config)
        # penalties are not computed in every step: the next row of the log repeats them
        checkpoint["logged"] = {"row": {k: float(v) for k, v in self._row.items()}, "sign": self._sign}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        logged = checkpoint.get("logged", {"row": {}, "sign": 0.0})
        self._row = {key: torch.tensor(value, device=self.device) for key, value in logged["row"].items()}
        self._sign = logged["sign"]

"""Small networks, a recorder of gradients, and the published training steps of e4e and ReStyle, for their tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.data.datamodules import InversionDataModule
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.lit.callbacks import LastCheckpoint
from psp_lightning.lit.e4e import CODES, E4E, FAKE_POOL, REAL_POOL, STYLES, LatentCritic, LitE4E
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.lit.psp import LitPSP
from psp_lightning.lit.rng import StepRNG
from psp_lightning.losses import CompositeLoss
from psp_lightning.losses.l2 import L2Loss
from psp_lightning.models.encoders import Encoder4Editing, GradualStyleEncoder, ReStyleEncoder4Editing
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator

SIZE, DIM, SEED, RATE = 32, 16, 5, 0.05
OPEN = {"noise": "random", "batch_norm": "local"}
FAST = {"start": 2, "every": 2, "delta_weight": 0.5, "adversarial_weight": 0.3, "discriminator_lr": 0.001, "pool": 3}


def network(cls: type[nn.Module] = Encoder4Editing, **options: Any) -> PSP:
    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=SIZE, style_dim=DIM, n_mapping=2, max_channels=16)
    encoder = cls(generator.n_styles, DIM, 3, SIZE, blocks=(1, 1, 1, 1), width=8, **options)
    return PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": SIZE})


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=RATE)


def module(net: PSP, recipe: dict[str, Any] | None = None, optimizer: Any = sgd, **options: Any) -> LitPSP:
    losses = CompositeLoss({"l2": L2Loss()}, {"l2": 1.0})
    # with frozen BatchNorm, float32 rounding changes gradients by less than 1e-5
    options = {"noise": "const", "batch_norm": "frozen", "source_is_target": True, **options}
    if recipe is None:
        return LitPSP(net, losses, optimizer, **options)
    return LitE4E(net, losses, optimizer, recipe=E4E(**recipe), seed=SEED, **options)


class Watch(pl.Callback):
    """Keeps the batches, and the encoder's weights and gradients of each step."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["target"].clone())
        self.states.append(copy.deepcopy(pl_module.net.encoder.state_dict()))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(gradients(pl_module.net.encoder))


def fit(
    lit: LitPSP, folder: Path, steps: int, *callbacks: pl.Callback, resume: Path | None = None, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], num_sanity_val_steps=0, limit_val_batches=0,
        **{"logger": False, **options},
    )  # fmt: skip
    faces = ToyFacesStore(size=SIZE, seed=1, n=10)
    data = InversionDataModule(faces, faces, input_size=SIZE, target_size=SIZE, batch_size=2)
    trainer.fit(lit, data, ckpt_path=resume)
    return trainer


def pooled(image: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(image, SIZE)


def check_gradients(found: dict[str, Tensor], encoder: nn.Module, step: int, zeros: bool = True) -> None:
    """Compare the whole gradient to 1e-5 and each parameter's gradient to 1e-4, relative to those of `encoder`.

    Without `zeros`, gradients of zero are left out: one implementation computes parts that it does not use, the other
    one does not.
    """
    expected = gradients(encoder)
    if not zeros:
        found, expected = ({name: g for name, g in grads.items() if g.any()} for grads in (found, expected))
    assert found.keys() == expected.keys(), f"step {step}: other parameters have gradients"
    errors = {name: (found[name] - expected[name]).norm() for name in expected}
    for name, gradient in expected.items():
        assert errors[name] <= 1e-4 * gradient.norm() + 1e-9, f"step {step}: {name}"
    whole = [torch.stack(list(norms)).norm() for norms in (errors.values(), (g.norm() for g in expected.values()))]
    assert whole[0] <= 1e-5 * whole[1], f"step {step}: {whole[0] / whole[1]}"


def gradients(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check_resume(
    make: Callable[..., LitPSP], folder: Path, stop: int, steps: int, keys: tuple[str, ...], **options: Any
) -> dict[str, Any]:
    """Compare a run of `steps` steps in `folder`/whole with one that is resumed after `stop`, and their logs.

    Returns:
        The checkpoint.
    """
    contents, logs = [], []
    for name, parts in (("whole", [steps]), ("parts", [stop, steps])):
        run = folder / name
        for k, end in enumerate(parts):
            resume, log = run / "last.ckpt" if k else None, CsvLog(run)
            log.keep_until(stop if k else 0)
            lit = make(optimizer=adam, log_every=1, **OPEN)
            fit(lit, run, end, LastCheckpoint(run, None), resume=resume, logger=log, **options)
        contents.append(torch.load(run / "last.ckpt", weights_only=True))
        logs.append((run / "metrics.csv").read_text())
    whole, resumed = contents
    for key in keys:
        assert same(whole[key], resumed[key]), f"{key} differs after the resume"
    assert logs[0].count("\n") > steps and logs[0] == logs[1], "the log differs after the resume"
    return whole


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


class Published:
    """e4e's training step, as its paper and code describe it."""

    def __init__(self, net: PSP, critic: LatentCritic, recipe: dict[str, Any]) -> None:
        self.net = net
        self.recipe = E4E(**recipe)
        linear = [layer for layer in critic.network.modules() if isinstance(layer, nn.Linear)]
        self.weights = [p.detach().clone().requires_grad_() for layer in linear for p in (layer.weight, layer.bias)]
        self.adam = torch.optim.Adam(self.weights, lr=self.recipe.discriminator_lr)
        self.pools: dict[int, list[Tensor]] = {REAL_POOL: [], FAKE_POOL: []}

    def scores(self, w: Tensor) -> Tensor:
        for i in range(0, len(self.weights), 2):
            w = w @ self.weights[i].T + self.weights[i + 1]
            w = torch.where(w > 0, w, 0.2 * w) if i + 2 < len(self.weights) else w
        return w

    def from_pool(self, codes: Tensor, step: int, purpose: int) -> Tensor:
        pool, result = self.pools[purpose], []
        draws = StepRNG(SEED, step, purpose).uniform(len(codes), 2)
        for code, (chance, place) in zip(codes, draws.tolist(), strict=True):
            if len(pool) < self.recipe.pool:
                pool.append(code)
                result.append(code)
            elif chance > 0.5:
                k = int(place * self.recipe.pool)
                result.append(pool[k].clone())
                pool[k] = code
            else:
                result.append(code)
        return torch.stack(result)

    def train_discriminator(self, w_plus: Tensor, stage: int, step: int) -> None:
        n = len(w_plus)
        z = StepRNG(SEED, step, CODES).normal(n, self.net.generator.z_dim)
        real = self.from_pool(self.net.generator.mapping(z).detach(), step, REAL_POOL)
        chosen = (StepRNG(SEED, step, STYLES).uniform(n) * (stage + 1)).long()
        fake = torch.stack([w_plus[i, k] for i, k in enumerate(chosen.tolist())]).detach()
        fake = self.from_pool(fake, step, FAKE_POOL)
        loss = F.softplus(-self.scores(real)).mean() + F.softplus(self.scores(fake)).mean()
        self.descend(loss)
        if step % self.recipe.r1_every == 0:
            real = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.scores(real).sum(), real, create_graph=True)
            penalty = slope.pow(2).sum(1).mean()
            self.descend(self.recipe.r1_gamma / 2 * penalty * self.recipe.r1_every)

    def descend(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        # the biases have no influence on the slope, and a gradient of zero in the published code
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        for p, gradient in zip(self.weights, gradients, strict=True):
            p.grad = torch.zeros_like(p) if gradient is None else gradient
        self.adam.step()

    def added_losses(self, w_plus: Tensor, stage: int) -> Tensor:
        deception = sum(F.softplus(-self.scores(w_plus[:, i])).mean() for i in range(stage + 1)) / (stage + 1)
        deltas = sum((w_plus[:, i] - w_plus[:, 0]).pow(2).sum(1).sqrt().mean() for i in range(1, stage + 1))
        return self.recipe.adversarial_weight * deception + self.recipe.delta_weight * deltas

    def stage(self, step: int) -> int:
        n, start, every = self.net.n_styles, self.recipe.start, self.recipe.every
        starts = [0, *range(start, start + (n - 1) * every, every)]
        return max(i for i, first in enumerate(starts) if step >= first)

    def codes(self, x: Tensor, stage: int) -> Tensor:
        styles = GradualStyleEncoder.forward(self.net.encoder, x)
        rest = [styles[:, 0] + (styles[:, i] if i <= stage else 0) for i in range(1, self.net.n_styles)]
        return torch.stack([styles[:, 0], *rest], 1) + self.net.latent_avg

    def step(self, y: Tensor, step: int) -> None:
        """Fill the gradients of the encoder."""
        stage = self.stage(step)
        self.net.encoder.zero_grad()
        w_plus = self.codes(y, stage)
        self.train_discriminator(w_plus, stage, step)
        loss = F.mse_loss(pooled(self.net.generator.synthesis(w_plus)), y) + self.added_losses(w_plus, stage)
        parameters = list(self.net.encoder.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            p.grad = gradient


def restyle_pass(net: PSP, x: Tensor, image: Tensor, codes: Tensor) -> Tensor:
    features = net.encoder.body(net.encoder.input_layer(torch.cat([x, pooled(image)], 1)))
    styles = [head(features) for head in net.encoder.styles]
    if isinstance(net.encoder, ReStyleEncoder4Editing):
        used = net.encoder.differences
        styles = [styles[0], *(styles[0] + (style if i < used else 0) for i, style in enumerate(styles[1:]))]
    return codes + torch.stack(styles, 1)

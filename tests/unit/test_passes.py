"""Training as ReStyle published it, with a loss and a backward pass for each pass of the encoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from psp_lightning.models.encoders import ReStyleEncoder, ReStyleEncoder4Editing
from tests.unit.published_steps import (
    FAST,
    Published,
    Watch,
    check_gradients,
    check_resume,
    fit,
    module,
    network,
    pooled,
    restyle_pass,
)


def test_restyle_has_the_published_gradients(tmp_path: Path) -> None:
    """A loss and a backward pass after each pass, with codes and image detached between the passes."""
    lit, watch = module(network(ReStyleEncoder, iterations=3), loss_per_pass=True), Watch()
    net = copy.deepcopy(lit.net)
    fit(lit, tmp_path, 3, watch)
    for step, (y, state, found) in enumerate(zip(watch.batches, watch.states, watch.gradients, strict=True)):
        net.encoder.load_state_dict(state)
        net.encoder.zero_grad()
        codes = net.latent_avg.expand(len(y), -1, -1)
        image = net.generator.synthesis(codes).detach()
        for _ in range(3):
            codes = restyle_pass(net, y, image.clone().detach(), codes.clone().detach())
            image = net.generator.synthesis(codes)
            F.mse_loss(pooled(image), y).backward()
        check_gradients(found, net.encoder, step)


def test_losses_of_passes_accumulate_over_batches_and_are_freed(tmp_path: Path) -> None:
    """A step over two batches has the mean of their gradients."""
    lit, watch = module(network(ReStyleEncoder, iterations=2), loss_per_pass=True), Watch()
    net = copy.deepcopy(lit.net)
    fit(lit, tmp_path, 2, watch, accumulate_grad_batches=2)
    for y in watch.batches[:2]:
        codes = net.latent_avg.expand(len(y), -1, -1)
        image = net.decode(codes)
        for _ in range(2):
            codes = restyle_pass(net, y, image.detach(), codes.detach())
            image = net.decode(codes)
            (F.mse_loss(pooled(image), y) / 2).backward()
    check_gradients(watch.gradients[0], net.encoder, 0)
    assert len(watch.gradients) == 2 and all(p.grad is None for p in lit.net.encoder.parameters())


def test_a_single_loss_remains_the_default(tmp_path: Path) -> None:
    lit, watch = module(network(ReStyleEncoder, iterations=2)), Watch()
    net = copy.deepcopy(lit.net)
    fit(lit, tmp_path, 1, watch)
    net.encoder.load_state_dict(watch.states[0])
    y = watch.batches[0]
    F.mse_loss(pooled(net.decode(net.encode(y))), y).backward()
    check_gradients(watch.gradients[0], net.encoder, 0)


def test_restyle_over_e4e_has_the_published_gradients(tmp_path: Path) -> None:
    """The discriminator is trained once per step, with the codes of the first pass; each pass has all losses."""
    recipe = {**FAST, "start": 1, "every": 1, "r1_every": 2}
    lit, watch = module(network(ReStyleEncoder4Editing, iterations=2), recipe, loss_per_pass=True), Watch()
    reference = Published(copy.deepcopy(lit.net), lit.critic, recipe)
    net = reference.net
    fit(lit, tmp_path, 4, watch)
    for step, (y, state, found) in enumerate(zip(watch.batches, watch.states, watch.gradients, strict=True)):
        net.encoder.load_state_dict(state)
        net.encoder.zero_grad()
        stage = net.encoder.differences = reference.stage(step)
        codes = net.latent_avg.expand(len(y), -1, -1)
        image = net.generator.synthesis(codes).detach()
        for k in range(2):
            codes = restyle_pass(net, y, image.detach(), codes.detach())
            if k == 0:
                reference.train_discriminator(codes, stage, step)
            image = net.generator.synthesis(codes)
            loss = F.mse_loss(pooled(image), y) + reference.added_losses(codes, stage)
            loss.backward()
        check_gradients(found, net.encoder, step, zeros=False)


def test_restyle_resume_is_bit_exact_in_bfloat16(tmp_path: Path) -> None:
    def make(**options: Any) -> Any:
        return module(network(ReStyleEncoder, iterations=2), **options, loss_per_pass=True)

    keys = ("state_dict", "optimizer_states", "random_state")
    check_resume(make, tmp_path, 2, 3, keys, precision="bf16-mixed")

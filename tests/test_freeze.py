"""Frozen modules stay in eval mode, get no gradients and keep their buffers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.layers import freeze
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator


@pytest.fixture
def embedder():
    return freeze(ArcFaceIRSE(input_size=32, blocks=(1, 1, 1, 1), width=8, embed_dim=16))


def test_train_keeps_eval(embedder, is_frozen):
    parent = nn.Sequential(nn.Dropout(), embedder).train()
    assert parent.training and parent[0].training
    embedder.body.train()
    assert not any(m.training for m in embedder.modules())
    assert embedder.train() is embedder and is_frozen(embedder)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_stay_frozen(embedder, remake, is_frozen):
    other = remake(embedder)
    assert is_frozen(other) and other.train() is other and not any(m.training for m in other.modules())


def test_is_frozen_detects_unfrozen_modules(is_frozen):
    net = nn.Linear(2, 2)
    assert not is_frozen(net) and not is_frozen(net.eval().requires_grad_(False))
    freeze(net).weight.requires_grad_(True)
    assert not is_frozen(net)


def test_gradients_pass_through_but_are_not_stored(embedder):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    buffers = {k: v.clone() for k, v in embedder.named_buffers()}
    embedder.train()(x)[:, 0].sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is None for p in embedder.parameters())
    assert all(torch.equal(v, buffers[k]) for k, v in embedder.named_buffers())


def test_generator_in_psp_after_a_training_step(is_frozen):
    generator = Generator(32, style_dim=32, n_mapping=2, max_channels=16)
    net = PSP(GradualStyleEncoder(8, 32, input_size=32, blocks=(1, 1, 1, 1), width=8), generator).train()
    before = {k: v.clone() for k, v in net.generator.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert is_frozen(net.generator) and not net.generator.training and net.encoder.training
    assert all(p.grad is None for p in net.generator.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.generator.state_dict().items())
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in net.encoder.parameters()
    )

"""Frozen networks of the losses: after a training step no gradient, buffers unchanged, eval mode after `.train()`."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from psp_lightning.losses import LOSSES, CompositeLoss, LossInputs, LossTerm, get_loss
from psp_lightning.losses.identity import IDLoss
from psp_lightning.models.frozen import is_frozen
from psp_lightning.models.irse import FaceEmbedder

TERMS = ["l2", "lpips", "id", "id_facenet", "moco", "w_norm", "l2_crop", "lpips_crop"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Files in the public layouts, with random values."""
    from torchvision.models import alexnet, resnet50

    facenet = pytest.importorskip("facenet_pytorch")
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moco = {f"module.encoder_q.{k}": v for k, v in resnet50(weights=None).state_dict().items()}
        features = {f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}
        files = {
            "lpips": features,
            "lpips_crop": features,
            "id": FaceEmbedder(n_layers=50, mode="ir_se", input_size=112).state_dict(),
            "id_facenet": facenet.InceptionResnetV1(pretrained=None).state_dict(),
            "moco": {"state_dict": moco},
        }
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in files}


def build(name: str, weights: dict[str, Path]) -> LossTerm:
    if name == "id_facenet":
        return IDLoss(backbone="facenet", weights=weights[name])
    return get_loss(name)(**({"weights": weights[name]} if name in weights else {}))


def test_every_loss_is_checked_here():
    ours = {name for name, cls in LOSSES.items() if cls.__module__.startswith("psp_lightning.")}
    assert ours <= set(TERMS), f"add {ours - set(TERMS)} to TERMS"


@pytest.mark.parametrize("name", TERMS)
def test_frozen_through_a_training_step(name, weights):
    term = build(name, weights)
    loss = CompositeLoss({name: term}, {name: 1.0})
    loss.train()
    for path, module in term.named_modules():
        assert path == "" or not module.training, f"{name}: {path} is in train mode after .train()"
    for child, module in term.named_children():
        assert is_frozen(module), f"{name}: {child} is not frozen"
    before = copy.deepcopy(loss.state_dict())

    generator = torch.Generator().manual_seed(0)
    picture = nn.Parameter(torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1)
    codes = nn.Parameter(torch.randn(2, 4, 8, generator=generator))
    y = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    optimizer = torch.optim.SGD([picture, codes, *(p for p in loss.parameters() if p.requires_grad)], lr=0.1)
    total, _ = loss(LossInputs(y_hat=picture, y=y, x=y, delta_w_plus=codes))
    total.backward()
    optimizer.step()

    trained = codes if name == "w_norm" else picture
    assert trained.grad is not None and torch.isfinite(trained.grad).all() and trained.grad.abs().sum() > 0
    for path, parameter in loss.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, f"{name}: {path} has a gradient"
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key]), f"{name}: {key} changed"
    for path, module in loss.eval().train().named_modules():
        if path.count(".") >= 2:  # terms.<name>.<network>...
            assert not module.training, f"{name}: {path} left eval mode"

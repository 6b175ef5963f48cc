"""The library's own embedding, and the losses that use one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psp_lightning.checkpoints.weight_files import save_embedding
from psp_lightning.loading import load_embedding
from psp_lightning.losses import IDLoss, LossInputs, PerceptualLoss
from psp_lightning.models.embedding import ToyFaceEmbedding
from psp_lightning.utils.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = ToyFaceEmbedding(32, (8, 12, 16), 10)
    with torch.no_grad():  # running statistics that differ from those of a new network
        network.train()(torch.rand(8, 3, 32, 32))
    save_embedding(tmp_path / "small.safetensors", network.eval(), {"licence": "MIT"})
    return tmp_path / "small.safetensors"


def images(n: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_shapes_and_unit_length(file: Path) -> None:
    network = load_embedding(file)
    x = images(4)
    assert [tuple(stage.shape) for stage in network.features(x)] == [(4, 8, 16, 16), (4, 12, 8, 8), (4, 16, 4, 4)]
    assert network.statistics(x).shape == (4, 36)
    assert torch.allclose(network(x).norm(dim=1), torch.ones(4), atol=1e-6)
    assert network(images(2, 64)).shape == network(images(2, 16)).shape == (2, 10)


def test_large_images_are_pooled(file: Path) -> None:
    network, x = load_embedding(file), images(2, 64)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.allclose(network(x), network(pooled), atol=1e-6)


@pytest.mark.parametrize("size", [4, 48])
def test_sizes_that_cannot_be_halved_are_rejected(size: int) -> None:
    with pytest.raises(UserError, match=f"input_size={size}"):
        ToyFaceEmbedding(size, (8, 12, 16))


def test_perceptual_distance(file: Path, is_frozen) -> None:
    loss = PerceptualLoss(str(file))
    x, y = images(3), images(3, seed=1)
    assert is_frozen(loss.network)
    assert torch.equal(loss.distance(x, x), torch.zeros(3))
    expected = torch.zeros(3)
    for a, b in zip(loss.network.features(x), loss.network.features(y), strict=True):
        for i in range(3):  # one minus cosine at each position, times two
            cosine = torch.nn.functional.cosine_similarity(a[i], b[i], dim=0)
            silent = (a[i].norm(dim=0) == 0) | (b[i].norm(dim=0) == 0)
            square = torch.where(
                silent, (a[i].norm(dim=0) > 0).float() + (b[i].norm(dim=0) > 0).float(), 2 - 2 * cosine
            )
            expected[i] += square.mean()
    assert torch.allclose(loss.distance(x, y), expected, atol=1e-5)
    leaf = x.clone().requires_grad_()
    loss(LossInputs(y_hat=leaf, y=y)).backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


def test_id_loss_accepts_an_embedding(file: Path) -> None:
    loss, x = IDLoss(str(file)), images(3)
    same = loss(LossInputs(y_hat=x, y=x, x=x))
    assert float(same.value) == pytest.approx(0, abs=1e-6)
    network = load_embedding(file)
    expected = (network(x) * network(images(3, seed=1))).sum(1)
    assert torch.allclose(loss.similarity(x, images(3, seed=1)), expected, atol=1e-6)


def test_weights_in_addition_to_an_embedding_are_rejected(file: Path) -> None:
    with pytest.raises(UserError, match=r"other\.pth cannot be combined with .*Leave one of them out"):
        IDLoss(str(file), weights="other.pth")


def test_unknown_identity_network_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="ir_se50, facenet, and files of embeddings"):
        IDLoss("ir_se5")

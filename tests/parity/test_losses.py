"""Losses against the reference implementation (pSp at commit 5cfff38) on drawn weights; see tests/golden/README.md."""

import pytest
import torch
import torch.nn.functional as F

from psp_lightning.losses import (
    IDLoss,
    L2CropLoss,
    L2Loss,
    LossInputs,
    LPIPSCropLoss,
    LPIPSLoss,
    MocoLoss,
    TermOutput,
    WNormLoss,
)
from psp_lightning.metrics import LPIPS, IdSimilarity

RTOL = 1e-5
# 1 - cosine of nearly equal vectors: the cosine is known to RTOL, and float32 near 1 has steps of 6e-8.
COSINE_ATOL = 3e-7


@pytest.fixture(scope="module")
def images(golden) -> LossInputs:
    def noise(name: str) -> torch.Tensor:
        return torch.from_numpy(golden.normal(name, 2, 3, 256, 256))

    def smooth(t: torch.Tensor) -> torch.Tensor:
        return F.interpolate(F.avg_pool2d(t, 16), size=256, mode="bilinear", align_corners=False) * 4

    # See tests/golden/README.md: a = smooth(N("loss.y")), but the stored values come from noise that was clamped first.
    # Without the clamp, the reference's own code misses loss_id.feats_y by 1.7e-2; with it, the error is 1.6e-7, and
    # loss_lpips_*, loss_id.* and loss_moco.* agree as well. loss.x and loss.y_hat are not clamped.
    a = smooth(noise("loss.y").clamp(-1, 1))
    y_hat = (a + 0.3 * smooth(noise("loss.y_hat"))).clamp(-1, 1)
    return LossInputs(y_hat=y_hat, y=a.clamp(-1, 1), x=smooth(noise("loss.x")).clamp(-1, 1))


@pytest.fixture(scope="module")
def alexnet(golden, tmp_path_factory):
    """Draw the convolutions of torchvision's AlexNet."""
    from torchvision.models import alexnet

    shapes = {f"features.{k}": list(v.shape) for k, v in alexnet(weights=None).features.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(golden.state_dict(shapes, "alexnet."), path)
    return path


@pytest.fixture(scope="module")
def id_loss(golden, tmp_path_factory) -> IDLoss:
    path = tmp_path_factory.mktemp("weights") / "ir_se50.pth"
    torch.save(golden.state_dict(golden.shapes()["ir_se50"], "ir_se50."), path)
    return IDLoss(weights=path)


@pytest.fixture(scope="module")
def moco_loss(golden, tmp_path_factory) -> MocoLoss:
    from torchvision.models import resnet50

    shapes = {k: list(v.shape) for k, v in resnet50(weights=None).state_dict().items() if not k.startswith("fc.")}
    drawn = golden.state_dict(shapes, "resnet50.")
    state = {f"module.encoder_q.{key}": value for key, value in drawn.items()}
    state |= {"module.encoder_q.fc.0.weight": torch.ones(1), "module.encoder_k.conv1.weight": torch.ones(1)}
    path = tmp_path_factory.mktemp("weights") / "moco.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": state}, path)
    return MocoLoss(weights=path)


def value_and_grad_norm(term, images: LossInputs) -> tuple[float, float]:
    y_hat = images.y_hat.clone().requires_grad_()
    output = term(LossInputs(y_hat=y_hat, y=images.y, x=images.x))
    value = output.value if isinstance(output, TermOutput) else output
    value.backward()
    return float(value.detach()), float(y_hat.grad.norm())


def test_l2(images, reference):
    assert float(L2Loss()(images)) == pytest.approx(float(reference["loss_l2.value"]), rel=RTOL)
    assert float(L2CropLoss()(images)) == pytest.approx(float(reference["loss_l2_crop.value"]), rel=RTOL)


def test_w_norm(golden, reference):
    latent = torch.from_numpy(golden.normal("loss_w_norm.latent", 2, 8, 512))
    average = torch.from_numpy(golden.normal("latent_avg", 512)) * 0.5
    expected = pytest.approx(float(reference["loss_w_norm.value"]), rel=RTOL)
    picture = torch.zeros(2, 3, 4, 4)
    codes = LossInputs(picture, picture, w_plus=latent, latent_avg=average.repeat(8, 1))
    assert float(WNormLoss()(codes)) == expected
    assert float(WNormLoss()(LossInputs(picture, picture, delta_w_plus=latent - average))) == expected


def test_lpips(images, reference, alexnet):
    value, norm = value_and_grad_norm(LPIPSLoss("alex", alexnet), images)
    assert value == pytest.approx(float(reference["loss_lpips_alex.value"]), rel=RTOL)
    assert norm == pytest.approx(float(reference["loss_lpips_alex.grad_norm"]), rel=RTOL)


def test_lpips_crop(images, reference, alexnet):
    value, _ = value_and_grad_norm(LPIPSCropLoss("alex", alexnet), images)
    assert value == pytest.approx(float(reference["loss_lpips_crop.value"]), rel=RTOL)


def test_id(images, reference, id_loss):
    with torch.no_grad():
        features = id_loss.embed(images.y)
        similarity = id_loss.similarity(images.y_hat, images.y)
        logs = id_loss(images).logs
    torch.testing.assert_close(features, torch.from_numpy(reference["loss_id.feats_y"]), rtol=1e-4, atol=1e-6)
    expected = torch.from_numpy(reference["loss_id.diff_target"])
    torch.testing.assert_close(similarity.double(), expected, rtol=RTOL, atol=0)
    assert float(logs["id_improvement"]) == pytest.approx(float(reference["loss_id.improvement"]), rel=RTOL)
    assert float(logs["id_similarity"]) == pytest.approx(float(reference["loss_id.diff_target"].mean()), rel=RTOL)
    value, norm = value_and_grad_norm(id_loss, images)
    assert value == pytest.approx(float(reference["loss_id.value"]), rel=RTOL, abs=COSINE_ATOL)
    assert norm == pytest.approx(float(reference["loss_id.grad_norm"]), rel=RTOL)


def test_metrics_measure_with_the_losses_networks(images, reference, alexnet, id_loss):
    lpips_loss = LPIPSLoss("alex", alexnet)
    lpips, similarity = LPIPS(lpips_loss.distance), IdSimilarity(id_loss.similarity)
    for metric in (lpips, similarity):
        metric.update(images.y_hat, images.y)
    assert float(lpips.compute()) == pytest.approx(float(reference["loss_lpips_alex.value"]), rel=RTOL)
    assert float(similarity.compute()) == pytest.approx(float(reference["loss_id.diff_target"].mean()), rel=RTOL)
    assert "network alex" in lpips_loss.convention and "ir_se50" in id_loss.convention


def test_moco(images, reference, moco_loss):
    with torch.no_grad():
        value, logs = moco_loss(images)
    assert float(value) == pytest.approx(float(reference["loss_moco.value"]), rel=RTOL, abs=COSINE_ATOL)
    improvement = float(reference["loss_moco.improvement"])
    assert float(logs["moco_improvement"]) == pytest.approx(improvement, rel=RTOL, abs=COSINE_ATOL)

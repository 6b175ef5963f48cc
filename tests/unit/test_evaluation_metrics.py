"""Values of the metrics against computations that share no code with them, on 20 pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from psp_lightning.checkpoints.weight_files import save_embedding
from psp_lightning.data.labels import CELEBAMASK_HQ, load_label_map
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.data.toyfaces.faces import draw_scene
from psp_lightning.losses.similarity import FeatureLoss
from psp_lightning.metrics import METRICS, SSIM, Diversity, HoleMSE, KnownMSE, MultiScaleSSIM
from psp_lightning.metrics.features import DomainFrechet, DomainKernel, Inception
from psp_lightning.metrics.frechet import frechet
from psp_lightning.metrics.networks import KIND_OF_CLASS, LabelIoU, MeanIoU, Perceptual, Pose, mean_iou, turn
from psp_lightning.metrics.sources import Consistency
from psp_lightning.models.face_parser import KINDS, ToyFaceParser
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8, to_uint8

N = 20


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets (20, 3, 64, 64) of 8 bits: smooth pictures, the outputs with noise."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(N, 3, 8, 8, generator=generator) * 2 - 1
    target = F.interpolate(small, size=64, mode="bicubic")
    noise = torch.randn(N, 3, 64, 64, generator=generator) * torch.linspace(0.01, 0.5, N)[:, None, None, None]
    return tuple(from_uint8(to_uint8(image)) for image in (target + noise, target))  # type: ignore[return-value]


def levels(image: torch.Tensor) -> np.ndarray:
    """Return (H, W, 3) with the 256 levels of 8 bits, float64."""
    return to_uint8(image).permute(1, 2, 0).numpy().astype(np.float64)


def one_by_one(metric, y_hat: torch.Tensor, y: torch.Tensor) -> list[float]:
    return [float(metric.per_image(a[None], b[None])) for a, b in zip(y_hat, y, strict=True)]


def test_mse_and_psnr(pairs) -> None:
    errors = [np.mean((levels(a) - levels(b)) ** 2) for a, b in zip(*pairs, strict=True)]
    assert one_by_one(METRICS["mse"](), *pairs) == pytest.approx([e / 127.5**2 for e in errors], rel=1e-5)
    expected = [20 * math.log10(255) - 10 * math.log10(e) for e in errors]
    assert one_by_one(METRICS["psnr"](), *pairs) == pytest.approx(expected, rel=1e-5)


def test_ssim_agrees_with_scikit_image(pairs) -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    expected = [
        structural_similarity(
            levels(a), levels(b), data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(*pairs, strict=True)
    ]  # fmt: skip
    assert one_by_one(SSIM(), *pairs) == pytest.approx(expected, rel=1e-5)


def test_ms_ssim_agrees_with_its_formula(pairs) -> None:
    """At 64 px there are three scales; the weights of the paper are divided by their sum."""
    x = np.arange(11) - 5.0
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:  # (H, W) -> (H - 10, W - 10)
        rows = np.apply_along_axis(np.convolve, 0, image, window, "valid")
        return np.apply_along_axis(np.convolve, 1, rows, window, "valid")

    def halve(image: np.ndarray) -> np.ndarray:
        return image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2).mean((1, 3))

    def of(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        c1, c2 = 0.01**2, 0.03**2
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
        contrast = (2 * cov + c2) / (var_a + var_b + c2)
        return float((contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)).mean()), contrast.mean()

    weights = np.array([0.0448, 0.2856, 0.3001]) / 0.6305
    expected = []
    for y_hat, y in list(zip(*pairs, strict=True))[:: N // 4]:
        a, b = levels(y_hat) / 255, levels(y) / 255
        values = []
        for scale in range(3):
            both = [of(a[..., c], b[..., c]) for c in range(3)]
            values.append(np.mean([similarity if scale == 2 else contrast for similarity, contrast in both]))
            a, b = (np.stack([halve(image[..., c]) for c in range(3)], -1) for image in (a, b))
        expected.append(float(np.prod(np.maximum(values, 0) ** weights)))
    found = one_by_one(MultiScaleSSIM(), *(image[:: N // 4] for image in pairs))
    assert found == pytest.approx(expected, rel=1e-5)


def test_structural_similarity_refuses_tiny_images() -> None:
    tiny = torch.zeros(1, 3, 8, 8)
    for metric in (SSIM(), MultiScaleSSIM()):
        with pytest.raises(UserError, match="at least 11 px, not 8 x 8"):
            metric.per_image(tiny, tiny)


def test_feature_distance_is_the_losses_distance(pairs) -> None:
    class Half(FeatureLoss):
        def features(self, image):
            return [F.avg_pool2d(image, 2)]

        def layer_distances(self, a, b):
            return [(x - y).square().mean((1, 2, 3)) for x, y in zip(a, b, strict=True)]

    pooled = [F.avg_pool2d(image.double(), 2) for image in pairs]
    expected = (pooled[0] - pooled[1]).square().mean((1, 2, 3)).tolist()
    assert one_by_one(Perceptual(Half().distance), *pairs) == pytest.approx(expected, rel=1e-5)


def test_hole_and_known_pixels_make_up_the_error(pairs) -> None:
    y_hat, y = pairs
    hole = (torch.rand(N, 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    source = torch.cat([y * (1 - hole), hole], 1)
    inside, outside = (metric.per_image(y_hat, y, source=source).double() for metric in (HoleMSE(), KnownMSE()))
    share = hole.double().mean((1, 2, 3))
    whole = (y_hat - y).double().square().mean((1, 2, 3))
    torch.testing.assert_close(share * inside + (1 - share) * outside, whole, rtol=1e-5, atol=0)
    source[0, 3] = 0
    assert HoleMSE().per_image(y_hat, y, source=source).isnan().tolist() == [True] + [False] * (N - 1)
    with pytest.raises(UserError, match="inpainting"):
        HoleMSE().per_image(y_hat, y, source=y)


def test_consistency_of_an_output_that_reduces_to_the_source(pairs) -> None:
    from psp_lightning.data.spec import InputSpec
    from psp_lightning.utils.images import to_pil

    _, y = pairs
    spec = InputSpec("lowres", 64, factors=(4, 8))
    factors = torch.tensor([4, 8] * (N // 2))
    source = torch.stack([spec.source.load(to_pil(image), factor=int(n)) for image, n in zip(y, factors, strict=True)])
    metric = Consistency()
    assert metric.per_image(y, y, source=source, factor=factors).tolist() == pytest.approx([106.0206] * N, abs=1e-3)
    wrong = metric.per_image(y, y, source=source, factor=12 - factors)
    assert float(wrong.max()) < 60


def test_diversity_is_the_mean_over_pairs(pairs) -> None:
    a, b, c = pairs[0][:3]
    expected = np.mean([float((x - y).abs().double().mean()) for x, y in ((a, b), (a, c), (b, c))])
    outputs = torch.stack([a, b, c])[None]
    assert float(Diversity().per_image(a[None], a[None], outputs=outputs)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="mix.n_outputs"):
        Diversity().per_image(a[None], a[None], outputs=outputs[:, :1])


def test_mean_iou() -> None:
    labels = torch.arange(len(KINDS)).repeat(2)[None, :, None]
    assert float(mean_iou(labels, labels)) == 1
    shifted = labels.clone()
    shifted[0, 0] = 1  # background: one of two pixels is missed; skin: three are found, two of them are right
    expected = (1 / 2 + 2 / 3 + len(KINDS) - 2) / len(KINDS)
    assert float(mean_iou(shifted, labels)) == pytest.approx(expected)
    two = torch.tensor([[[0, 0, 1]], [[0, 1, 1]]])  # regions that are in neither map do not count
    assert float(mean_iou(two[:1], two[1:])) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_regions_and_classes_agree() -> None:
    names = load_label_map(CELEBAMASK_HQ).names
    kinds = list(KINDS)
    assert sorted(names) == sorted(name for members in KINDS.values() for name in members)
    for name, kind in zip(names, KIND_OF_CLASS, strict=True):
        assert name in KINDS[kinds[kind]], name


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("parser") / "parser.safetensors"
    save_embedding(path, ToyFaceParser(width=4).eval())
    return path


def test_iou_measures_with_the_parser(pairs, parser: Path) -> None:
    y_hat, y = pairs
    metric = MeanIoU(str(parser))
    values = one_by_one(metric, y_hat, y)
    assert 0 < min(values) and max(values) < 1 and one_by_one(metric, y, y) == [1.0] * N
    regions = metric.parser.regions(y)
    classes = torch.tensor([KIND_OF_CLASS.index(kind) for kind in range(len(KINDS))])[regions]
    source = F.one_hot(classes, len(KIND_OF_CLASS)).permute(0, 3, 1, 2).float()
    assert LabelIoU(str(parser)).per_image(y_hat, y, source=source).tolist() == pytest.approx(values)
    with pytest.raises(UserError, match="seg2face"):
        LabelIoU(str(parser)).per_image(y_hat, y, source=y)
    with pytest.raises(UserError, match="not a face parser"):
        MeanIoU("toyfaces/identity")


def test_turn_is_the_distance_of_the_features_from_the_middle_of_the_face() -> None:
    eyes, skin = list(KINDS).index("eyes"), list(KINDS).index("skin")
    regions = torch.zeros(2, 4, 10, dtype=torch.long)
    regions[:, 1:3, 2:8] = skin  # the middle of the face is 0.5
    regions[0, 1, 6] = eyes
    assert turn(regions).tolist() == pytest.approx([0.65 - 0.5, 0]), "the second face has no eyes and mouth"


def test_pose_follows_the_turn_of_the_head() -> None:
    faces = ToyFaces(size=64, seed=8, n=60)
    yaw = torch.tensor([draw_scene(np.random.default_rng([8, 2, i])).yaw for i in range(60)])
    images, fronts = (
        torch.stack([draw(i) for i in range(60)]) for draw in (lambda i: faces[i]["image"], faces.frontal)
    )
    metric = Pose()
    assert float(torch.corrcoef(torch.stack([metric.per_image(images, fronts), yaw.sin().abs()]))[0, 1]) > 0.8
    assert metric.per_image(fronts, fronts).tolist() == [0.0] * 60


def test_frechet_distance_of_sets(pairs) -> None:
    y_hat, y = pairs
    same, other = DomainFrechet(), DomainFrechet()
    for a, b in zip(y_hat, y, strict=True):
        same.update(b[None], b[None])
        other.update(a[None], b[None])
    assert float(same.compute()) == pytest.approx(0, abs=1e-3) and float(other.compute()) > 0.1
    halves = DomainFrechet()
    halves.update(y[: N // 2], y[N // 2 :])
    assert float(halves.compute()) > 0.1
    with torch.no_grad():
        features = [other.network(image).double().numpy() for image in (y_hat, y)]
    means = [f.mean(0) for f in features]
    covariances = [np.cov(f, rowvar=False) for f in features]
    # an eigenvalue of the product of two covariances is the square of one of the geometric mean's
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    roots = roots[roots > 1e-6]  # the rest is rounding: there are 20 images and 320 features
    expected = np.sum((means[0] - means[1]) ** 2) + sum(np.trace(c) for c in covariances) - 2 * roots.sum()
    assert float(other.compute()) == pytest.approx(expected, rel=1e-4)


def test_frechet_of_singular_covariances_does_not_depend_on_rounding() -> None:
    x = torch.randn(5, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, covariance = x.mean(0), torch.cov(x.t())
    noise = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-17
    values = [float(frechet(mean, covariance + e, mean * 0, 2 * covariance)) for e in (0, noise + noise.t())]
    assert values[1] == pytest.approx(values[0], rel=1e-11)


def test_kernel_distance_agrees_with_torchmetrics(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr("psp_lightning.metrics.features.BLOCK", 7)  # several blocks
    metric = DomainKernel()
    for a, b in zip(*pairs, strict=True):
        metric.update(a[None], b[None])
    with torch.no_grad():
        fake, real = (metric.network(image).double() for image in pairs)
    assert float(metric.compute()) == pytest.approx(float(poly_mmd(real, fake)), rel=1e-5)


@pytest.mark.parametrize("cls", [DomainFrechet, DomainKernel])
def test_one_image_is_no_set(cls, pairs) -> None:
    metric = cls()
    metric.update(pairs[0][:1], pairs[1][:1])
    with pytest.raises(UserError, match="at least two"):
        metric.compute()


def test_inception_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metric.fid.weights=FILE"):
        Inception(None)
    with pytest.raises(UserError, match="do not exist: .*none.pth"):
        Inception(tmp_path / "none.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.pth"):
        Inception(tmp_path / "junk.pth")


def test_inception_without_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("torch-fidelity")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", missing)
    torch.save({"weight": torch.ones(1)}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        Inception(tmp_path / "inception.pth")


def test_fid_and_kid_measure_with_the_file(pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reads the file as torch-fidelity does and is called with 8-bit images."""

    class Features(torch.nn.Module):
        def __init__(self, name: str, features: list[str], path: str) -> None:
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])
            self.weight = torch.load(path, weights_only=True)["weight"]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8
            return self.weight * images.float().mean((2, 3)) / 255

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Features)
    torch.save({"weight": torch.tensor(2.0)}, tmp_path / "inception.pth")
    for name in ("fid", "kid"):
        metric = METRICS[name](weights=tmp_path / "inception.pth")
        metric.update(*pairs)
        assert abs(float(metric.compute())) < 1 and "299 px" in metric.convention


def test_a_metric_says_its_convention(pairs) -> None:
    for name in ("mse", "psnr", "ssim", "ms_ssim", "consistency", "mse_hole", "mse_known", "diversity"):
        assert METRICS[name]().convention, name
    assert "toyfaces/identity" in DomainFrechet().convention

"""The metric id_aligned: where it cuts, what it compares, and images without a face."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data.faces import Detector, detect_faces
from psp_lightning.lit.evaluation import Given, LitEvaluator, collate_images
from psp_lightning.losses.identity import IDLoss
from psp_lightning.metrics import AlignedIdSimilarity
from psp_lightning.metrics.identity import PLACES, SIZE, cut_for_recognition
from psp_lightning.utils.arguments import ArgumentError
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8


def load(path, size: int = 256) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def tensor(image: Image.Image) -> torch.Tensor:
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.fixture(scope="module")
def pictures(photos) -> torch.Tensor:
    """Return three photos of faces and a grey picture, (4, 3, 256, 256)."""
    pytest.importorskip("facenet_pytorch")
    grey = Image.new("RGB", (256, 256), "gray")
    return torch.stack([tensor(image) for image in (*(load(photos / f"face_{i}.jpg") for i in range(3)), grey)])


def pixels(face: torch.Tensor, other: torch.Tensor, aligned: bool = False) -> torch.Tensor:
    """Compare crops instead of embeddings."""
    assert aligned and face.shape[1:] == other.shape[1:] == (3, SIZE, SIZE)
    return torch.nn.functional.cosine_similarity(face.flatten(1), other.flatten(1))


# --- the cut


def test_a_face_in_its_place_is_not_changed(photos) -> None:
    image = load(photos / "face_0.jpg", SIZE)
    assert np.array_equal(cut_for_recognition(image, PLACES), image)


def test_cut_agrees_with_least_squares_and_bilinear_samples(photos) -> None:
    """Four unknowns a, b, c, d: the point (ax - by + c, bx + ay + d) of the photo is at (x, y) in the crop."""
    image = load(photos / "face_2.jpg")
    rng = np.random.default_rng(0)
    turned = PLACES @ np.array([[0.96, 0.28], [-0.28, 0.96]]) * 1.7 + (40, -25) + rng.normal(0, 3, (5, 2))
    rows = [row for x, y in PLACES for row in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, c, d = np.linalg.lstsq(np.array(rows), turned.ravel(), rcond=None)[0]
    y, x = np.mgrid[:SIZE, :SIZE]
    u, v = a * x - b * y + c, b * x + a * y + d
    inside = (u >= 0) & (v >= 0) & (u <= 255) & (v <= 255)
    left, top = np.clip(np.floor(u), 0, 254).astype(int), np.clip(np.floor(v), 0, 254).astype(int)
    right, down = (u - left)[..., None], (v - top)[..., None]
    levels = np.asarray(image, float)
    upper = levels[top, left] * (1 - right) + levels[top, left + 1] * right
    lower = levels[top + 1, left] * (1 - right) + levels[top + 1, left + 1] * right
    expected = upper * (1 - down) + lower * down
    found = np.asarray(cut_for_recognition(image, turned), float)
    assert 0.5 < inside.mean() < 1 and abs(found - expected)[inside].max() <= 1
    far = (u < -1) | (v < -1) | (u > 256) | (v > 256)
    assert far.any() and (found[far] == 0).all(), "outside the photo it is black"


def test_a_large_face_is_reduced_first(photos) -> None:
    image = load(photos / "face_1.jpg", 256)
    places = PLACES + 20
    expected = np.asarray(cut_for_recognition(image, places), int)
    noisy = np.asarray(image.resize((2048, 2048), Image.Resampling.NEAREST), int)
    noisy = noisy + np.random.default_rng(0).integers(-60, 61, noisy.shape)
    large = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    found = np.asarray(cut_for_recognition(large, (places + 0.5) * 8 - 0.5), int)
    assert abs(found - expected).mean() < 10, "single pixels were sampled, with errors of 30 levels"


# --- the values


def test_values_are_cosines_of_embeddings_of_the_crops(pictures, golden, tmp_path) -> None:
    torch.save(golden.state_dict(golden.shapes()["ir_se50"], "ir_se50."), tmp_path / "ir_se50.pth")
    term = IDLoss(weights=tmp_path / "ir_se50.pth")
    assert term.face_convention == "ir_se50 at 112 px"
    y_hat, y = pictures[[0, 1, 2]], pictures[[0, 2, 1]]
    values = AlignedIdSimilarity(term.similarity).per_image(y_hat, y)
    embedded = []
    for picture in pictures[:3]:
        image = Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        (face,) = detect_faces(image)
        crop = tensor(cut_for_recognition(image, face.landmarks))
        with torch.no_grad():
            embedded.append(term.network(crop[None])[0].double())
    expected = [1.0, float(embedded[1] @ embedded[2]), float(embedded[1] @ embedded[2])]
    assert values.tolist() == pytest.approx(expected, abs=1e-5) and expected[1] < 0.999


def test_the_place_of_a_face_does_not_matter(pictures) -> None:
    small = torch.nn.functional.interpolate(pictures[:3], size=192, mode="bilinear", antialias=True)
    first, second = torch.full((2, 3, 3, 256, 256), -1.0)
    first[..., :192, :192], second[..., 60:252, 40:232] = small, small
    aligned = AlignedIdSimilarity(pixels).per_image(first, second)
    fixed = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1))
    assert aligned.min() > 0.95 and fixed.max() < 0.9, (aligned, fixed)


def test_batches_do_not_change_the_mean_and_images_without_a_face_do_not_count(pictures) -> None:
    y_hat, y = pictures[[0, 1, 3, 0]], pictures[[0, 2, 1, 3]]
    means = []
    for size in (1, 3, 4):
        metric = AlignedIdSimilarity(pixels)
        for a, b in zip(y_hat.split(size), y.split(size), strict=True):
            metric.update(a, b)
        means.append(float(metric.compute()))
    values = metric.per_image(y_hat, y)
    assert values.isnan().tolist() == [False, False, True, True]
    assert means == pytest.approx([float(values[:2].mean())] * 3, rel=1e-6)
    assert metric.reason(y_hat[2:3], y[2:3]) == "no face in the output"
    assert metric.reason(y_hat[3:], y[3:]) == "no face in the target"
    assert metric.reason(y_hat[2:3], y[3:]) == "no face in the output, no face in the target"


def test_an_evaluation_keeps_the_reasons(pictures) -> None:
    module = LitEvaluator(Given(), {"id_aligned": AlignedIdSimilarity(pixels)}, torch.nn.Identity())
    pairs = [(0, 0), (3, 0)]
    items = [{"output": pictures[a], "target": pictures[b], "index": i} for i, (a, b) in enumerate(pairs)]
    module.predict_step(collate_images(items), 0)
    found = module.results(2)
    assert found.per_image["id_aligned"][0] == pytest.approx(1) and math.isnan(found.per_image["id_aligned"][1])
    assert found.missing == {"id_aligned": {1: "no face in the output"}} and not found.errors


def test_a_failing_search_is_a_reason(pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, photos):
        raise UserError("image: the face detector fails on this photo")

    monkeypatch.setattr(Detector, "__call__", fail)
    metric = AlignedIdSimilarity(pixels)
    assert metric.per_image(pictures[:1], pictures[:1]).isnan().all()
    assert "the face detector fails" in metric.reason(pictures[:1], pictures[:1])


def test_faces_on_their_side_are_not_searched_for(pictures) -> None:
    turned = torch.rot90(pictures[:1], 1, (2, 3))
    image = Image.fromarray(((turned[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    assert len(Detector(score=0.99)([image])[0]) == 1 and not Detector(score=0.99, turned=None)([image])[0]


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("facenet_pytorch")
    with pytest.raises(ArgumentError, match="score=2 must be a number"):
        AlignedIdSimilarity(pixels, score=2)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="id_aligned needs .* pip install --no-deps facenet-pytorch==2.6.0"):
        AlignedIdSimilarity(pixels)

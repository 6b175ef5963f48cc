"""Transforms against the reference implementation (eladrich/pixel2style2pixel, commit 5cfff38)."""

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data import transforms
from psp_lightning.data.labels import LabelMap
from psp_lightning.data.spec import InputSpec, load_source

TOLERANCE = 1 / 255


@pytest.fixture
def photo(reference):
    return Image.fromarray(reference["transform.photo"])


def check(ours, expected):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TOLERANCE


def test_rgb(photo, reference):
    tensor = load_source(photo, InputSpec("rgb", 256))
    check(tensor.numpy()[:, ::8, ::8], reference["transform.encode_stride8"])


def test_sketch(photo, reference):
    tensor = load_source(photo.convert("L"), InputSpec("sketch", 256))
    check(tensor.numpy()[:, ::8, ::8], reference["transform.sketch_stride8"])


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_superres(photo, reference, factor):
    tensor = load_source(photo, InputSpec("lowres", 256, factors=(1, 2, 4, 8, 16, 32)), factor=factor)
    check(tensor.numpy()[:, ::8, ::8], reference[f"transform.superres_x{factor}_stride8"])


def test_superres_pads_by_mirroring_as_torch_does(photo):
    """The expected result is reflect padding, then two one-dimensional strided convolutions."""
    import torch
    from torch.nn import functional as F

    image = transforms._to_tensor(photo)[:, :97, :130]
    for factor in (1, 3, 4):
        taps = transforms._bicubic_taps(factor).repeat(3)
        a, b = (3 * factor) // 2, 3 * factor - (3 * factor) // 2
        x = F.conv2d(F.pad(image[None], (0, 0, a, b), "reflect"), taps.view(3, 1, -1, 1), stride=(factor, 1), groups=3)
        x = F.conv2d(F.pad(x, (a, b, 0, 0), "reflect"), taps.view(3, 1, 1, -1), stride=(1, factor), groups=3)
        assert torch.equal(transforms.bicubic_down(image, factor), x[0])


def test_labels_legacy(reference):
    """The reference resizes ids bilinearly before its one-hot step; `transform.mask` is every 16th pixel of blocks."""
    mask = Image.fromarray(np.kron(reference["transform.mask"], np.ones((16, 16), np.uint8)))
    spec = InputSpec("labels", 256, n_classes=19, interpolation="legacy_bilinear")
    tensor = load_source(mask, spec)
    check(tensor.numpy()[:, 8::16, 8::16], reference["transform.seg_stride16"].astype(np.float32))


def test_labels_nearest_creates_no_new_neighbours(reference):
    mask = Image.fromarray(np.kron(reference["transform.mask"], np.ones((16, 16), np.uint8)))
    nearest = transforms.labels(mask, 256, LabelMap.numbered(19)).argmax(0).numpy()
    rows = np.floor((np.arange(256) + 0.5) * 320 / 256).astype(int)
    assert (nearest == np.asarray(mask)[np.ix_(rows, rows)]).all()


def test_ffhq_crop(reference):
    """Crop scikit-image's astronaut, whose landmarks are stored with the reference values."""
    data = pytest.importorskip("skimage.data")
    from psp_lightning.data.align import align_face

    crop = align_face(Image.fromarray(data.astronaut()), *reference["align.eye_left_right_mouth_left_right"], size=256)
    difference = np.abs(np.asarray(crop)[::4, ::4].astype(int) - reference["align.crop256_stride4"].astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize("factor", [3, 5, 13])
def test_taps_of_other_factors_are_rounded_before_they_are_normalised(factor):
    """The reference computes them in float64, because its factor is a numpy integer, and rounds to float32 first."""
    x = np.abs((np.arange(4 * factor) - 2 * factor + 0.5) / factor)
    cubic = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    taps = torch.from_numpy(cubic).float()
    assert torch.equal(transforms._bicubic_taps(factor), taps / taps.sum())

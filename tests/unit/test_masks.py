"""Holes for inpainting."""

import numpy as np
import pytest
from PIL import Image

from psp_lightning.data.masks import as_mask, draw_mask
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.utils.errors import UserError


@pytest.mark.parametrize("kind", ["box", "brush", "half", "random"])
def test_drawn_masks(kind):
    masks = [draw_mask(64, np.random.default_rng(i), kind) for i in range(20)]
    for mask in masks:
        assert mask.shape == (64, 64) and mask.dtype == bool
        assert 0.005 < mask.mean() < 0.75, f"{kind}: {mask.mean():.3f} of the image"
    assert len({mask.tobytes() for mask in masks}) > 3
    assert np.array_equal(masks[0], draw_mask(64, np.random.default_rng(0), kind))


def test_options():
    assert draw_mask(50, np.random.default_rng(0), "box", low=1.0, high=1.0).all()
    left = draw_mask(8, np.random.default_rng(0), "half", side="left")
    assert left[:, :4].all() and not left[:, 4:].any()


def test_files(tmp_path):
    Image.fromarray(np.pad(np.full((10, 10), 255, np.uint8), 5)).save(tmp_path / "a.png")
    mask = draw_mask(40, np.random.default_rng(0), "file", folder=tmp_path)
    assert mask.sum() == 400 and mask[20, 20] and not mask[0, 0]
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="Cannot read mask .*a.png"):
        draw_mask(40, np.random.default_rng(0), "file", folder=tmp_path)


def test_as_mask_reads_any_range():
    half = np.zeros((4, 4), np.uint8)
    half[:2] = 1
    for array in (half, half * 255, half.astype(bool), half.astype(np.float32)):
        assert np.array_equal(as_mask(array, 4), half.astype(bool))
    for image in (Image.fromarray(half), Image.fromarray(half * 255), Image.fromarray(half * 255).convert("1")):
        assert np.array_equal(as_mask(image, 4), half.astype(bool))
    assert np.array_equal(as_mask(Image.fromarray(half * 255).convert("RGB"), 4), half.astype(bool))


def test_errors():
    with pytest.raises(UserError, match="Did you mean 'brush'"):
        draw_mask(8, np.random.default_rng(0), "brus")
    with pytest.raises(UserError, match="width"):
        draw_mask(8, np.random.default_rng(0), "box", width=3)
    with pytest.raises(UserError, match="Did you mean 'left'"):
        draw_mask(8, np.random.default_rng(0), "half", side="lefd")
    with pytest.raises(UserError, match="does not exist"):
        draw_mask(8, np.random.default_rng(0), "file", folder="/nowhere")


def test_masked_source():
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    spec = InputSpec("masked", 16, mask={"kind": "half", "side": "left"})
    source = load_source(image, spec, rng=np.random.default_rng(0))
    assert source.shape == (4, 16, 16)
    assert (source[:3, :, :8] == 0).all() and (source[3, :, :8] == 1).all()
    assert (source[0, :, 8:] == 1).all() and (source[3, :, 8:] == 0).all()
    # the mask as an argument, then as transparent pixels
    hole = np.zeros((16, 16), bool)
    hole[3] = True
    assert (load_source(image, spec, mask=hole)[3].numpy() == hole).all()
    alpha = Image.fromarray(np.where(hole, 0, 255).astype(np.uint8))
    image.putalpha(alpha)
    assert (load_source(image, spec)[3].numpy() == hole).all()

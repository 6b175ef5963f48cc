"""Images for generator training: the accepted files, how they are fitted, and that all of them are used."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data.datamodules import ImageDataModule
from psp_lightning.data.image_sets import FolderImages, ToyFacesImages, fit_image
from psp_lightning.utils.errors import UserError


def write(path: Path, width: int = 16, height: int = 16, colour: object = (200, 100, 0), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), colour).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(5):
        write(tmp_path / "images" / f"{i}.png", colour=(i * 10, 0, 0))
    return tmp_path / "images"


# --- sizes


def test_own_size(root: Path) -> None:
    images = FolderImages(root)
    assert (images.size, len(images)) == (16, 5)
    item = images[2]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    torch.testing.assert_close(item["image"][0], torch.full((16, 16), 20 / 127.5 - 1))
    assert item["path"] == str(root / "2.png")


def test_subfolders_are_searched_and_limit_cuts(root: Path) -> None:
    write(root / "more" / "x.png")
    assert len(FolderImages(root)) == 6
    assert len(FolderImages(root, limit=2)) == 2


def test_mixed_sizes_name_the_file_and_both_sizes(root: Path) -> None:
    write(root / "3b.png", 24, 20)
    with pytest.raises(UserError, match=r"3b\.png has 24x20 pixels, .*0\.png has 16x16.*data\.fit=squash, pad or crop"):
        FolderImages(root)


def test_size_that_the_images_do_not_have(root: Path) -> None:
    with pytest.raises(UserError, match=r"0\.png has 16x16 pixels, but domain\.size=32.*data\.fit"):
        FolderImages(root, size=32)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 16, 8)
    with pytest.raises(UserError, match=r"a\.png has 16x8 pixels, which is not square"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_fit_accepts_images_of_all_sizes(root: Path, fit: str) -> None:
    write(root / "3b.png", 24, 20)
    images = FolderImages(root, size=8, fit=fit)
    assert len(images) == 6
    assert {images[i]["image"].shape for i in range(6)} == {(3, 8, 8)}


def test_images_of_48_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 48, 48)
    with pytest.raises(UserError, match=r"a\.png has 48x48 pixels.*power of two.*domain\.size=64"):
        FolderImages(tmp_path)
    assert FolderImages(tmp_path, size=32, fit="squash")[0]["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("size", [48, 4, 0, 33])
def test_requested_size_is_not_a_power_of_two(root: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"^size={size} must be a power of two"):
        FolderImages(root, size=size, fit="crop")
    with pytest.raises(UserError, match=f"^size={size} must be a power of two"):
        FolderImages(root, size=size)
    with pytest.raises(UserError, match=f"^size={size} must be a power of two"):
        ToyFacesImages(size)


def test_fit_needs_a_size_and_a_known_name(root: Path) -> None:
    with pytest.raises(UserError, match=r"domain\.size"):
        FolderImages(root, fit="crop")
    with pytest.raises(UserError, match="^fit=croop is unknown. Did you mean 'crop'"):
        FolderImages(root, size=16, fit="croop")


def test_no_folder_given() -> None:
    with pytest.raises(UserError, match=r"data\.root=DIR"):
        FolderImages(None)


# --- fitting, exactly


def stripes(width: int, height: int) -> Image.Image:
    """Return an image with a red left, green middle and blue right third and a white top row."""
    array = np.zeros((height, width, 3), np.uint8)
    third = width // 3
    for i in range(3):
        array[:, i * third : (i + 1) * third, i] = 255
    array[0] = 255
    return Image.fromarray(array)


def test_crop_keeps_the_centre() -> None:
    image = stripes(24, 8)
    out = np.asarray(fit_image(image, 8, "crop"))
    assert np.array_equal(out, np.asarray(image)[:, 8:16])


def test_crop_with_an_odd_margin_stays_inside_the_image() -> None:
    out = np.asarray(fit_image(stripes(27, 8), 8, "crop"))
    assert out.shape == (8, 8, 3) and out[1:, :, 1].min() == 255, "the crop contains pixels outside the middle third"


def test_pad_repeats_the_edge() -> None:
    image = stripes(24, 8)
    out = np.asarray(fit_image(image, 24, "pad"))
    assert np.array_equal(out[8:16], np.asarray(image))
    assert (out[:8] == 255).all(), "above, the white top row must be repeated"
    assert np.array_equal(out[16:], np.repeat(np.asarray(image)[-1:], 8, 0)), "below, the last row must be repeated"


def test_pad_of_a_tall_image() -> None:
    tall = stripes(24, 8).transpose(Image.Transpose.ROTATE_90)
    out = np.asarray(fit_image(tall, 24, "pad"))
    assert np.array_equal(out[:, 8:16], np.asarray(tall))
    assert np.array_equal(out[:, :8], np.repeat(np.asarray(tall)[:, :1], 8, 1))


def test_squash_scales_both_sides() -> None:
    image = stripes(24, 8)
    out = np.asarray(fit_image(image, 8, "squash"))
    assert np.array_equal(out, np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS)))
    assert out[4, 0].argmax() == 0 and out[4, 7].argmax() == 2, "both ends must be kept"


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_an_image_of_the_right_size_is_not_changed(fit: str) -> None:
    image = stripes(9, 9).resize((16, 16))
    assert np.array_equal(np.asarray(fit_image(image, 16, fit)), np.asarray(image))


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("shape", [(1, 100), (100, 1), (1, 1), (37, 23)])
def test_odd_shapes(shape: tuple[int, int], fit: str) -> None:
    assert fit_image(Image.new("RGB", shape, (9, 8, 7)), 16, fit).size == (16, 16)


# --- kinds of files


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 120, "png", (120, 120, 120)),
        ("LA", (120, 255), "png", (120, 120, 120)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("I;16", 120 * 257, "png", (120, 120, 120)),
        ("P", 0, "png", (0, 0, 0)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "tif", (0, 0, 0)),
    ],
)
def test_kinds(mode: str, colour: object, suffix: str, expected: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", colour=colour, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = FolderImages(tmp_path)[0]["image"]
    assert [round((v + 1) * 127.5) for v in image.mean((1, 2)).tolist()] == list(expected)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    stripes(24, 8).save(tmp_path / "a.png", exif=exif)
    out = FolderImages(tmp_path, size=8, fit="crop").pixels(0)
    upright = stripes(24, 8).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(out, np.asarray(upright)[8:16])
    with pytest.raises(UserError, match="8x24"):
        FolderImages(tmp_path)


def test_floating_point_pixels_are_rejected_before_training(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", mode="F", colour=0.5)
    with pytest.raises(UserError, match=r"a\.tif.*floating-point.*replace it"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_used(suffix: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], lossless=True)
    assert FolderImages(tmp_path).pixels(0)[0, 0].tolist() == [255, 0, 0]


# --- broken files


@pytest.mark.parametrize("options", [{}, {"size": 16, "fit": "crop"}])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "signature only"])
def test_files_without_an_image_are_found_before_training(content: bytes, options: dict, root: Path) -> None:
    (root / "3b.png").write_bytes(content)
    with pytest.raises(UserError, match=r"3b\.png cannot be read as an image.*Remove it or replace it"):
        FolderImages(root, **options)


@pytest.mark.parametrize("options", [{}, {"size": 64, "fit": "pad"}])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pixels_are_named_when_they_are_read(options: dict, workers: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    images = FolderImages(tmp_path, **options)
    with pytest.raises(UserError, match=r"Cannot read image .*1\.png"):
        images[1]
    with pytest.raises(UserError, match=r"^Cannot read image .*1\.png"):
        list(ImageDataModule(images, 3, workers).train_dataloader())


# --- batches


def test_every_image_is_seen(root: Path) -> None:
    """An epoch drops the incomplete batch at its end, which contains different images each time."""
    loader = ImageDataModule(FolderImages(root), 2).train_dataloader()
    epochs = [[Path(p).stem for batch in loader for p in batch["path"]] for _ in range(6)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert {name for epoch in epochs for name in epoch} == set("01234")


def test_fewer_images_than_a_batch(root: Path) -> None:
    with pytest.raises(UserError, match=r"5 images, fewer than one batch of 8.*data\.batch_size=5"):
        ImageDataModule(FolderImages(root), 8).train_dataloader()


def test_flips_depend_on_seed_epoch_and_index(tmp_path: Path) -> None:
    stripes(9, 9).resize((16, 16)).save(tmp_path / "a.png")
    plain = FolderImages(tmp_path)[0]["image"]
    images = FolderImages(tmp_path, flip=True)
    flipped = [not torch.equal(images[epoch, 0]["image"], plain) for epoch in range(200)]
    assert 60 < sum(flipped) < 140
    again = [not torch.equal(images[epoch, 0]["image"], plain) for epoch in range(200)]
    assert flipped == again
    turned = next(epoch for epoch, yes in enumerate(flipped) if yes)
    assert torch.equal(images[turned, 0]["image"], plain.flip(-1))
    other = FolderImages(tmp_path, flip=True, seed=1)
    assert flipped != [not torch.equal(other[epoch, 0]["image"], plain) for epoch in range(200)]


def test_cache_changes_nothing(root: Path) -> None:
    plain, cached = FolderImages(root, flip=True), FolderImages(root, flip=True, cache=True)
    for _ in range(2):
        for epoch in range(3):
            assert torch.equal(plain[epoch, 1]["image"], cached[epoch, 1]["image"])


def test_toyfaces() -> None:
    images = ToyFacesImages(32, n=6, limit=4)
    assert len(images) == 4 and images[3]["image"].shape == (3, 32, 32)
    assert torch.equal(images[3]["image"], ToyFacesImages(32, n=6)[3]["image"])
    assert not torch.equal(images[3]["image"], ToyFacesImages(32, n=6, toy_seed=2)[3]["image"])
    assert "seed1/000003" in images[3]["path"]

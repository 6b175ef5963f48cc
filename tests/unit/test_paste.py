"""A face that is put back unedited gives the photo back; an edited one changes its square only, without a seam."""

import numpy as np
import pytest
from PIL import Image

from psp_lightning.data.align import crop_corners, cut_face
from psp_lightning.data.paste import paste_back
from psp_lightning.utils.errors import UserError

# Eyes and corners of the mouth that MTCNN finds
POINTS = {
    "face_0.jpg": [[197.22, 230.81], [320.32, 242.57], [200.36, 364.32], [324.85, 376.68]],
    "face_1.jpg": [[190.58, 238.07], [325.07, 239.51], [205.13, 382.37], [320.14, 379.7]],
    "face_2.jpg": [[191.81, 239.25], [316.36, 236.68], [198.43, 386.91], [301.94, 384.96]],
    "input_img.jpg": [[380.89, 483.66], [643.78, 482.46], [384.62, 755.55], [635.92, 749.81]],
    "astronaut": [[205.01, 101.73], [246.76, 103.71], [201.72, 139.25], [245.27, 141.86]],
}


def picture(name: str, photos) -> Image.Image:
    if name == "astronaut":
        return Image.fromarray(pytest.importorskip("skimage.data").astronaut())
    return Image.open(photos / name).convert("RGB")


def rotated(photo: Image.Image, points, degrees: float) -> tuple[Image.Image, np.ndarray]:
    """Return a photo turned counterclockwise around its centre, in black, and the points in it."""
    angle, centre = np.deg2rad(degrees), np.array(photo.size) / 2 - 0.5
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return photo.rotate(degrees, Image.Resampling.BICUBIC), (np.asarray(points) - centre) @ turn + centre


def inside(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return which pixels of a photo lie in the square, bool (H, W)."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    points = np.stack([x, y], -1) - corners[0]
    right, down = corners[3] - corners[0], corners[1] - corners[0]
    u, v = points @ right / (right @ right), points @ down / (down @ down)
    return (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)


def psnr(a: Image.Image, b: Image.Image, where: np.ndarray) -> float:
    error = (np.asarray(a, float) - np.asarray(b, float))[where]
    return float(10 * np.log10(255**2 / max(np.square(error).mean(), 1e-9)))


@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("name", list(POINTS))
@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0])
def test_unedited_faces_give_the_photo_back(photos, name, degrees, ratio):
    photo, points = picture(name, photos), np.array(POINTS[name])
    if degrees:
        photo, points = rotated(photo, points, degrees)
    corners = crop_corners(*points)
    side = np.hypot(*(corners[3] - corners[0]))
    crop = cut_face(photo, corners, int(np.ceil(side * ratio)))
    result = paste_back(photo, crop, corners)
    face = inside(corners, photo.size)
    assert np.array_equal(np.asarray(result)[~face], np.asarray(photo)[~face]), "pixels outside have changed"
    assert psnr(result, photo, face) >= 40, f"{psnr(result, photo, face):.1f} dB"


def test_smaller_crops_are_put_in_the_right_place(photos):
    """A crop is blurred if it is smaller; a wrong place would cost far more."""
    photo, corners = picture("input_img.jpg", photos), crop_corners(*POINTS["input_img.jpg"])
    face = inside(corners, photo.size)
    for size in (64, 128, 256, 512):
        result = paste_back(photo, cut_face(photo, corners, size), corners)
        shifted = paste_back(photo, cut_face(photo, corners, size), corners + 1034 / size)
        assert psnr(result, photo, face) > psnr(shifted, photo, face) + 1.5, size
        assert psnr(result, photo, face) > 24, size


def test_an_edit_arrives_everywhere_but_at_the_edge(photos):
    photo, corners = picture("astronaut", photos), crop_corners(*POINTS["astronaut"])
    result = np.asarray(paste_back(photo, Image.new("RGB", (64, 64), (200, 30, 90)), corners), int)
    middle = inside(corners.mean(0) + 0.75 * (corners - corners.mean(0)), photo.size)
    assert (abs(result[middle] - [200, 30, 90]) <= 1).all()
    face = inside(corners, photo.size)
    assert np.array_equal(result[~face], np.asarray(photo)[~face])
    flat = paste_back(Image.new("RGB", photo.size), Image.new("RGB", (64, 64), "white"), corners)
    steps = np.abs(np.diff(np.asarray(flat, int)[..., 0], axis=1)).max()
    assert steps < 30, "the edge is not blended"
    hard = paste_back(Image.new("RGB", photo.size), Image.new("RGB", (64, 64), "white"), corners, feather=0)
    assert np.abs(np.diff(np.asarray(hard, int)[..., 0], axis=1)).max() > 200


def test_colours_are_matched_at_the_seam(photos):
    photo, corners = picture("astronaut", photos), crop_corners(*POINTS["astronaut"])
    crop = np.asarray(cut_face(photo, corners, 256), int)
    tinted = Image.fromarray(np.clip(crop + [25, -15, 10], 0, 255).astype(np.uint8))
    face = inside(corners, photo.size)
    plain, matched = (paste_back(photo, tinted, corners, match_colour=flag) for flag in (False, True))
    assert psnr(plain, photo, face) < 25 and psnr(matched, photo, face) > 30


def test_masks(photos):
    photo, corners = picture("astronaut", photos), crop_corners(*POINTS["astronaut"])
    half = Image.new("L", (100, 100))
    half.paste(255, (0, 0, 50, 100))
    result = np.asarray(paste_back(photo, Image.new("RGB", (64, 64), "red"), corners, mask=half), int)
    left, right = (corners[0] * (1 - s) + corners[3] * s + (corners[1] - corners[0]) / 2 for s in (0.3, 0.7))
    assert tuple(result[tuple(left.round().astype(int)[::-1])]) == (255, 0, 0)
    x, y = right.round().astype(int)
    assert np.array_equal(result[y, x], np.asarray(photo)[y, x])


def test_several_faces_that_overlap(photos):
    photo = picture("astronaut", photos)
    one = crop_corners(*POINTS["astronaut"])
    places = np.stack([one, one + [100, 0]])
    colours = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for order in ([0, 1], [1, 0]):
        result = np.asarray(paste_back(photo, [colours[i] for i in order], places[order]), int)
        for i, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
            x, y = places[i].mean(0).round().astype(int)
            assert tuple(result[y, x]) == colour, "the centre of a face belongs to this face"
    crops = [cut_face(photo, place, 512) for place in places]
    union = inside(places[0], photo.size) | inside(places[1], photo.size)
    assert psnr(paste_back(photo, crops, places), photo, union) >= 40


def test_contents_of_the_file(photos, tmp_path):
    photo, corners = picture("astronaut", photos), crop_corners(*POINTS["astronaut"])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    photo.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif, icc_profile=b"profile")
    crop = cut_face(photo, corners, 256)
    result = paste_back(tmp_path / "a.png", crop, corners)
    assert result.size == photo.size and np.array_equal(result, paste_back(photo, crop, corners))
    result.save(tmp_path / "b.png", **result.info)
    again = Image.open(tmp_path / "b.png")
    assert again.info["icc_profile"] == b"profile" and again.getexif()[0x010F] == "maker"
    assert 0x0112 not in again.getexif(), "the photo would be turned twice"
    photo.convert("CMYK").save(tmp_path / "c.tif", icc_profile=b"profile")
    assert "icc_profile" not in paste_back(tmp_path / "c.tif", crop, corners).info


def test_mistakes(photos):
    photo, corners = picture("astronaut", photos), crop_corners(*POINTS["astronaut"])
    square = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match="must be square, but it has 64 x 32 pixels"):
        paste_back(photo, Image.new("RGB", (64, 32)), corners)
    with pytest.raises(UserError, match="four corners"):
        paste_back(photo, [square], corners[:2])
    with pytest.raises(UserError, match="four corners"):
        paste_back(photo, [square], np.stack([corners, corners]))
    with pytest.raises(UserError, match="feather=0.6 must be a number, from 0 to 0.5"):
        paste_back(photo, square, corners, feather=0.6)
    with pytest.raises(UserError, match="The face lies outside the photo"):
        paste_back(photo, square, corners + 5000)

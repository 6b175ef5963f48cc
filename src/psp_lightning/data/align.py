"""The FFHQ crop that face models expect: the positions of eyes and mouth determine how a photo is rotated and cropped.

Source: Karras et al., arXiv:1812.04948, appendix A (the FFHQ data set). The order of rounding follows the published
FFHQ preprocessing, which the pSp reference uses with an output size of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from psp_lightning.utils.errors import UserError
from psp_lightning.utils.pictures import ImageLike, open_8bit

Point = Sequence[float]


def crop_corners(eye_left: Point, eye_right: Point, mouth_left: Point, mouth_right: Point) -> np.ndarray:
    """Return the corners of the crop as float64 (4, 2): x, y of upper left, lower left, lower right, upper right.

    The crop is a square. Its rotation is a mean of the eye line and the face's vertical axis; its side is the larger
    of 4 eye distances and 3.6 face heights (eyes to mouth).

    Raises:
        UserError: the points coincide or are not finite.
    """
    eyes, mouth = np.array([eye_left, eye_right], float), np.array([mouth_left, mouth_right], float)
    across = eyes[1] - eyes[0]
    down = mouth.mean(0) - eyes.mean(0)
    x = across + np.array([down[1], -down[0]])
    if not np.isfinite(x).all() or np.hypot(*x) == 0:
        raise UserError(f"These points do not form a face: eyes {eyes.tolist()}, mouth corners {mouth.tolist()}.")
    x = x / np.hypot(*x) * max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    y = np.array([-x[1], x[0]])
    centre = eyes.mean(0) + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (H, W) with a Gaussian truncated at 4 sigma, mirroring the borders including the edge pixel."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2)
    taps /= taps.sum()
    for _ in range(2):
        n = image.shape[1]
        index = np.arange(-radius, n + radius) % (2 * n)
        index = np.where(index < n, index, 2 * n - 1 - index)
        length = 1 << (n + 4 * radius).bit_length()  # a product of spectra is a convolution: much faster than the sum
        spectrum = np.fft.rfft(taps, length)
        blurred = np.empty_like(image)
        for start in range(0, len(image), 128):  # bounds the memory
            rows = np.fft.rfft(image[start : start + 128, index], length, axis=1)
            blurred[start : start + 128] = np.fft.irfft(rows * spectrum, length, axis=1)[:, 2 * radius : 2 * radius + n]
        image = blurred.T
    return image


def _pad(image: Image.Image, pads: np.ndarray, quad_size: float) -> Image.Image:
    """Extend the photo (left, top, right, bottom) by mirroring, fading outwards into blur and the median colour."""
    left, top, right, bottom = pads.tolist()
    planes = []
    for plane in image.split():  # one by one, which needs less memory
        array = np.pad(np.asarray(plane, np.float32), ((top, bottom), (left, right)), "reflect")
        height, width = array.shape
        y, x = np.ogrid[:height, :width]
        near = np.minimum(
            np.minimum(x / max(left, 1e-6), (width - 1 - x) / max(right, 1e-6)),
            np.minimum(y / max(top, 1e-6), (height - 1 - y) / max(bottom, 1e-6)),
        )
        outside = 1 - near
        array += (_blur(array, quad_size * 0.02) - array) * np.clip(3 * outside + 1, 0, 1)
        array += (np.median(array) - array) * np.clip(outside, 0, 1)
        planes.append(Image.fromarray(np.clip(array.round(), 0, 255).astype(np.uint8)))
    return Image.merge("RGB", planes)


@dataclass(frozen=True)
class Cut:
    """How a crop is cut from a photo.

    Attributes:
        shrink: factor by which the photo is first made smaller.
        size: width and height of the smaller photo.
        box: left, top, right and bottom of the part of the smaller photo that is used.
        pads: pixels that are added to the left, top, right and bottom of the part; all 0 if it is large enough.
        quad: corners of the crop within the padded part, float64 (4, 2), in the order of `crop_corners`.
    """

    shrink: int
    size: tuple[int, int]
    box: np.ndarray
    pads: np.ndarray
    quad: np.ndarray

    @property
    def quad_size(self) -> float:
        """Side of the crop within the padded part, in pixels."""
        return float(np.hypot(*(self.quad[3] - self.quad[0])))


def plan_cut(photo_size: tuple[int, int], corners: np.ndarray, size: int) -> Cut:
    """Return how a square is cut from a photo and scaled.

    Args:
        photo_size: width and height of the photo in pixels.
        corners: corners of the square in pixels of the photo, float64 (4, 2), see `crop_corners`.
        size: height and width of the crop.

    Raises:
        UserError: the square lies outside the photo.
    """
    quad = np.asarray(corners, float)
    quad_size = float(np.hypot(*(quad[3] - quad[0])))
    shrink = max(int(np.floor(quad_size / size * 0.5)), 1)
    width, height = photo_size
    if shrink > 1:  # otherwise the bilinear transform would skip pixels
        photo_size = max(int(np.rint(width / shrink)), 1), max(int(np.rint(height / shrink)), 1)
        quad, quad_size = quad / shrink, quad_size / shrink
    border = max(int(np.rint(quad_size * 0.1)), 3)
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    box = np.concatenate([np.maximum(low - border, 0), np.minimum(high + border, photo_size)])
    if (box[2:] <= box[:2]).any():
        raise UserError(f"The face lies outside the photo of {width} x {height} pixels.")
    quad = quad - box[:2]
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    pads = np.maximum(np.concatenate([border - low, high - (box[2:] - box[:2]) + border]), 0)
    pads = np.maximum(pads, int(np.rint(quad_size * 0.3))) if pads.max() > border - 4 else np.zeros_like(pads)
    return Cut(shrink, photo_size, box, pads, quad + pads[:2])


def cut_face(photo: Image.Image, corners: np.ndarray, size: int = 256) -> Image.Image:
    """Return the square with these corners from an RGB photo, scaled to `size` x `size`; see `align_face`.

    Args:
        photo: RGB image.
        corners: corners of the square in pixels of the photo, float64 (4, 2), see `crop_corners`.
        size: height and width of the result.

    Raises:
        UserError: the square lies outside the photo.
    """
    cut = plan_cut(photo.size, corners, size)
    if cut.shrink > 1:
        photo = photo.resize(cut.size, Image.Resampling.LANCZOS)
    if (cut.box[2:] - cut.box[:2] < photo.size).any():
        photo = photo.crop(tuple(cut.box.tolist()))
    if cut.pads.any():
        photo = _pad(photo, cut.pads, cut.quad_size)
    return photo.transform(
        (size, size), Image.Transform.QUAD, tuple((cut.quad + 0.5).ravel().tolist()), Image.Resampling.BILINEAR
    )


def align_face(
    image: ImageLike, eye_left: Point, eye_right: Point, mouth_left: Point, mouth_right: Point, size: int = 256
) -> Image.Image:
    """Return the FFHQ crop of a photo, an RGB image of `size` x `size`.

    Areas outside the photo are filled by mirroring and blurring. `psp_lightning.data.faces.detect_faces` finds the
    positions: `align_face(image, *face.points)`.

    Args:
        image: path or PIL image; the EXIF orientation is applied.
        eye_left, eye_right: x and y of the eye centres, in pixels; left and right are as seen in the photo.
        mouth_left, mouth_right: x and y of the mouth corners, in pixels.
        size: height and width of the crop.

    Raises:
        UserError: the image cannot be read, the points do not form a face, or the face lies outside the photo.
    """
    photo = open_8bit(image, "RGB")
    return cut_face(photo, crop_corners(eye_left, eye_right, mouth_left, mouth_right), size)

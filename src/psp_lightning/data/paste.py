"""Put edited faces back into their photo, at the resolution of the photo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from psp_lightning.data.align import Cut, cut_face, plan_cut
from psp_lightning.utils.arguments import number
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.pictures import ImageLike, open_8bit, open_image, to_8bit

STRIP = 1 << 20  # pixels that are computed at once, which bounds the memory
SEAM = 256  # pixels, side of the crops in which the colours along the margin are compared
KEPT = ("icc_profile", "exif")  # other data in a photo's file, which is kept if the photo is in RGB


def paste_back(
    photo: ImageLike,
    edited: ImageLike | Sequence[ImageLike],
    corners: np.ndarray,
    feather: float = 0.1,
    match_colour: bool = False,
    mask: ImageLike | Sequence[ImageLike] | None = None,
) -> Image.Image:
    """Return a photo, as an RGB image, in which aligned faces are replaced with edited versions of them.

    The faces are rotated and scaled back, and blended over a margin along the edge of each square. Pixels outside the
    squares do not change. Where the crop had to be filled because the square extends beyond the photo, the photo's own
    pixels remain. Where squares overlap, each pixel belongs to the face whose centre is closer, measured in sides of
    its square.

    Args:
        photo: path or PIL image; the EXIF orientation is applied.
        edited: edited face or faces, square, of any size.
        corners: corners of the crops in pixels of the photo, float64 (4, 2) for one face or (N, 4, 2) for several, see
            `psp_lightning.data.align.crop_corners`.
        feather: width of the blended margin as a share of the side of the square, 0 to 0.5.
        match_colour: True: shift the colours of each face so that their mean along the margin equals the photo's.
        mask: picture or pictures of the shape of `edited`, white where the edited face is wanted; None: everywhere.

    Raises:
        UserError: a picture cannot be read, an edited face is not square, the numbers of faces, corners and masks
            differ, an argument is out of range, or a square lies outside the photo.
    """
    number("feather", feather, 0, 0.5)
    result = open_image(photo)
    kept = KEPT if result.mode in ("RGB", "RGBA", "P") else ()  # a colour profile of CMYK or grey would be wrong
    info: dict[Any, Any] = {key: result.info[key] for key in kept if key in result.info}
    result = to_8bit(result, "RGB")
    places = np.asarray(corners, np.float64)
    many = places.ndim == 3
    faces: Sequence[ImageLike] = edited if many else [edited]  # type: ignore[assignment,list-item]
    masks: Sequence[ImageLike | None] = (mask if many else [mask]) if mask is not None else [None] * len(faces)  # type: ignore[assignment,list-item]
    places = places if many else places[None]
    if places.shape[1:] != (4, 2) or isinstance(faces, str) or not len(faces) == len(places) == len(masks):
        raise UserError("paste_back needs four corners (x, y), and a mask if masks are given, for each edited face.")
    patches = [
        _Patch.of(result, face, place, feather, other, match_colour)
        for face, place, other in zip(faces, places, masks, strict=True)
    ]
    result.info = info
    for patch in patches:
        others = [other for other in patches if other is not patch and other.overlaps(patch)]
        for box in patch.strips():
            colours, share = patch.render(box)
            for other in others:
                share *= patch.precedence(other, box)
            if share.any():
                under = np.asarray(result.crop(box), np.float32)
                blended = under + (colours - under) * share[..., None]
                result.paste(Image.fromarray(np.clip(blended.round(), 0, 255).astype(np.uint8)), box[:2])
    return result


@dataclass(eq=False)
class _Patch:
    """An edited face and its place in the photo.

    Attributes:
        face: RGB image, reduced if it is much larger than its place.
        quad: corners of the place in the photo.
        cut: how the crop was cut from the photo, which determines where it was filled.
        scale: width and height of the photo after `cut.shrink`, divided by those before.
        region: left, top, right and bottom of the place in the photo.
        feather, mask: see `paste_back`.
        shift: difference (3,) that is added to the colours.
    """

    face: Image.Image
    quad: np.ndarray
    cut: Cut
    scale: np.ndarray
    region: tuple[int, int, int, int]
    feather: float
    mask: Image.Image | None
    shift: np.ndarray

    @classmethod
    def of(
        cls, photo: Image.Image, edited: ImageLike, quad: np.ndarray, feather: float, mask: ImageLike | None,
        match_colour: bool,
    ) -> _Patch:  # fmt: skip
        face = open_8bit(edited, "RGB")
        if face.width != face.height:
            raise UserError(f"An edited face must be square, but it has {face.width} x {face.height} pixels.")
        cut = plan_cut(photo.size, quad, face.width)
        side = float(np.hypot(*(quad[3] - quad[0])))
        low = np.maximum(np.floor(quad.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(quad.max(0)).astype(int) + 1, photo.size)
        shown = None if mask is None else open_8bit(mask, "L")
        scale = np.array(cut.size) / np.array(photo.size)
        patch = cls(face, quad, cut, scale, (*low.tolist(), *high.tolist()), feather, shown, np.zeros(3, np.float32))
        if match_colour:
            patch.shift = patch._seam(photo)
        if face.width > 2.5 * side:  # sampling it would skip pixels
            patch.face = face.resize((max(8, round(2 * side)),) * 2, Image.Resampling.LANCZOS)
        if cut.shrink == 1:
            patch.face = patch._sharpened(photo)
        return patch

    def _sharpened(self, photo: Image.Image) -> Image.Image:
        """Return the face plus the detail that it would lose by being put into the photo and cut out again.

        A crop from the result is then closer to the face. This is one step of back-projection (Irani and Peleg, 1991).
        """
        margin = int(self.cut.quad_size * 0.15) + 4  # more than `plan_cut` uses
        low = np.maximum(np.array(self.region[:2]) - margin, 0)
        high = np.minimum(np.array(self.region[2:]) + margin, photo.size)
        part = photo.crop((*low.tolist(), *high.tolist()))
        for box in self.strips():
            u, v = self.position(box)
            within = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
            place = (box[0] - int(low[0]), box[1] - int(low[1]))
            part.paste(self._sample(self.face, box, Image.Resampling.BICUBIC), place, Image.fromarray(within))
        again = np.asarray(cut_face(part, self.quad - low, self.face.width), np.int16)
        return Image.fromarray(np.clip(2 * np.asarray(self.face, np.int16) - again, 0, 255).astype(np.uint8))

    def _seam(self, photo: Image.Image) -> np.ndarray:
        """Return the mean difference between photo and edited face along the margin, float32 (3,)."""
        before = np.asarray(cut_face(photo, self.quad, SEAM), np.float32)
        after = np.asarray(self.face.resize((SEAM, SEAM), Image.Resampling.BOX), np.float32)
        u = (np.arange(SEAM) + 0.5) / SEAM
        x, y = np.meshgrid(u, u)
        margin = np.minimum.reduce([x, 1 - x, y, 1 - y]) < max(self.feather, 2 / SEAM)
        points = (
            self.quad[0] + x[..., None] * (self.quad[3] - self.quad[0]) + y[..., None] * (self.quad[1] - self.quad[0])
        )
        margin &= ((points >= 0) & (points <= np.array(photo.size) - 1)).all(-1)
        return (before - after)[margin].mean(0) if margin.any() else np.zeros(3, np.float32)

    def overlaps(self, other: _Patch) -> bool:
        a, b = self.region, other.region
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

    def strips(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield boxes (left, top, right, bottom) that cover the region, each at most `STRIP` pixels or one row."""
        left, top, right, bottom = self.region
        rows = max(1, STRIP // max(1, right - left))
        for start in range(top, bottom, rows):
            if left < right:
                yield left, start, right, min(start + rows, bottom)

    def position(self, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return where the pixels of a box lie in the square, (H, W): 0 to 1 from left to right and top to bottom."""
        u, v = self._affine()
        x, y = np.arange(box[0], box[2]), np.arange(box[1], box[3])[:, None]
        return tuple((c[0] * x + c[1] * y + c[2]).astype(np.float32) for c in (u, v))  # type: ignore[return-value]

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a, b, c of u = a x + b y + c, and the same for v, for pixels x, y of the photo."""
        origin, right, down = self.quad[0], self.quad[3] - self.quad[0], self.quad[1] - self.quad[0]
        # `cut_face` takes the crop from the photo after shrinking it by a whole number. There, pixel x of the photo is
        # at (x + 0.5) * scale - 0.5, and the corners are at their positions divided by that number.
        shift = 0.5 * self.scale - 0.5 - origin / self.cut.shrink
        rows = []
        for axis in (right, down):
            unit = axis / (axis @ axis) * self.cut.shrink
            rows.append(np.array([unit[0] * self.scale[0], unit[1] * self.scale[1], unit @ shift]))
        return rows[0], rows[1]

    def render(self, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the face in a box of the photo, float32 (H, W, 3), and its share in each pixel, float32 (H, W)."""
        u, v = self.position(box)
        edge = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
        if self.feather > 0:
            share = _smooth(np.minimum(u, 1 - u) / self.feather) * _smooth(np.minimum(v, 1 - v) / self.feather)
        else:
            share = (edge >= 0).astype(np.float32)
        share *= self._trust(box)
        if self.mask is not None:
            share *= np.asarray(self._sample(self.mask, box, Image.Resampling.BILINEAR), np.float32) / 255
        return np.asarray(self._sample(self.face, box, Image.Resampling.BICUBIC), np.float32) + self.shift, share

    def _sample(self, image: Image.Image, box: tuple[int, int, int, int], how: Image.Resampling) -> Image.Image:
        size = np.array([[image.width], [image.height]])
        coefficients = np.stack(self._affine()) * size
        # in Pillow, the centre of pixel x is x + 0.5, both in the box and in the image
        coefficients[:, 2] += coefficients[:, 0] * (box[0] - 0.5) + coefficients[:, 1] * (box[1] - 0.5)
        shape = (box[2] - box[0], box[3] - box[1])
        return image.transform(shape, Image.Transform.AFFINE, tuple(coefficients.ravel().tolist()), how)

    def _trust(self, box: tuple[int, int, int, int]) -> np.ndarray | float:
        """Return 1 where the crop shows the photo itself, falling to 0 where it was filled by `_pad` of align.py."""
        if not self.cut.pads.any():
            return 1.0
        pads = np.maximum(self.cut.pads, 1e-6)
        width, height = self.cut.box[2:] - self.cut.box[:2] + self.cut.pads[:2] + self.cut.pads[2:]
        x = (np.arange(box[0], box[2]) + 0.5) * self.scale[0] - 0.5 - self.cut.box[0] + self.cut.pads[0]
        y = (np.arange(box[1], box[3]) + 0.5) * self.scale[1] - 0.5 - self.cut.box[1] + self.cut.pads[1]
        across = np.minimum(x / pads[0], (width - 1 - x) / pads[2])
        down = np.minimum(y / pads[1], (height - 1 - y) / pads[3])
        near = np.minimum(across, down[:, None])  # 1 at the border of the photo, 4/3 where it is not blurred
        return _smooth(3 * near - 3).astype(np.float32)

    def precedence(self, other: _Patch, box: tuple[int, int, int, int]) -> np.ndarray:
        """Return the share of this face in the pixels of a box that `other` may also cover, float32 (H, W)."""
        mine, theirs = (
            np.maximum(abs(2 * u - 1), abs(2 * v - 1)) for u, v in (self.position(box), other.position(box))
        )
        return np.where(theirs < 1, _smooth((theirs - mine) / 0.2 + 0.5), 1).astype(np.float32)


def _smooth(x: np.ndarray) -> np.ndarray:
    """Return 0 below 0, 1 above 1, and a smooth step in between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)

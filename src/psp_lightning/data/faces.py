"""Faces in photos: detection with MTCNN, and the choice among several faces.

Source: Zhang et al., arXiv:1604.02878. The package facenet-pytorch contains the networks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from psp_lightning.data.align import crop_corners
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.optional import facenet_pytorch
from psp_lightning.utils.pictures import ImageLike, name_of, open_8bit

POINTS = ("eye_left", "eye_right", "nose", "mouth_left", "mouth_right")  # in MTCNN's order
SMALLEST = 20  # pixels, the side of the smallest face that is searched for
CHOICES = ("all", "largest", "central")
TURNS = {0: None, 90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a photo.

    Attributes:
        landmarks: x and y of the left eye, right eye, nose, left and right corner of the mouth, float64 (5, 2), in
            pixels of the upright photo. Left and right are as seen when the face is upright. NaN: not known.
        score: score of the detector, 0 to 1; None: the landmarks are from a file.
    """

    landmarks: np.ndarray
    score: float | None = None

    @property
    def points(self) -> np.ndarray:
        """Both eyes and both corners of the mouth, float64 (4, 2): the positions that `align_face` takes."""
        return self.landmarks[[0, 1, 3, 4]]

    @property
    def corners(self) -> np.ndarray:
        """The corners of the FFHQ crop, float64 (4, 2), see `psp_lightning.data.align.crop_corners`.

        Raises:
            UserError: the points do not form a face.
        """
        return crop_corners(*self.points)

    @property
    def side(self) -> float:
        """Side of the FFHQ crop in pixels; 0 if the points do not form a face."""
        try:
            corners = self.corners
        except UserError:
            return 0.0
        return float(np.hypot(*(corners[3] - corners[0])))

    def fault(self, size: tuple[int, int]) -> str | None:
        """Return why the face cannot be aligned in a photo of this width and height, or None if it can.

        Both eyes and both corners of the mouth must be known and lie in the photo. If the nose is known, it must not
        lie beyond an eye by more than half the distance between the eyes: that would mean that one eye is hidden.
        """
        for name, point in zip(POINTS, self.landmarks, strict=True):
            if name == "nose":
                continue
            if not np.isfinite(point).all():
                return f"the position of {name} is not known"
            if (point < -0.5).any() or (point > np.array(size) - 0.5).any():
                x, y = point.round().astype(int)
                return f"{name} at ({x}, {y}) lies outside the photo of {size[0]} x {size[1]} pixels"
        left, right, nose = self.landmarks[:3]
        across = right - left
        if self.side == 0 or not across.any():
            return "the points do not form a face"
        along = float((nose - left) @ across / (across @ across))  # 0 at the left eye, 1 at the right eye
        if not -0.5 <= along <= 1.5 and np.isfinite(along):
            return "the face is turned to the side, so that only one eye is seen"
        return None


Candidate = tuple[Face, tuple[bool, float]]  # a face and its rank, see `_rank`
# MTCNN also finds faces that lie on their side or are upside down, but with lower scores and wrong positions.
SURE = (True, 0.995)
NONE = [(None, (False, 0.0))]


@functools.lru_cache(maxsize=2)
def _mtcnn(device: str) -> Any:
    package = facenet_pytorch("Face detection")
    return package.MTCNN(keep_all=True, min_face_size=SMALLEST, device=device)


@dataclass(frozen=True)
class Detector:
    """Finds the faces in photos.

    Args:
        longest: largest number of pixels on the longer side; a larger photo is reduced to it before the search. Faces
            whose box is then smaller than 20 pixels are not found.
        score: smallest score of a face, 0 to 1.
        turned: True: search every photo upright and turned by 90, 180 and 270 degrees, for photos in which some faces
            are upright and others are not. False: turn only photos with no face, or with one that may not be upright
            because its score is below 0.995 or its positions are tilted by more than 45 degrees. None: turn no photo.
        device: device of the network, such as `cpu` or `cuda`.

    Raises:
        UserError: an argument is invalid.
    """

    longest: int = 1024
    score: float = 0.9
    turned: bool | None = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        whole("longest", self.longest, SMALLEST)
        number("score", self.score, 0, 1)

    def __call__(self, photos: Sequence[Image.Image]) -> list[list[Face]]:
        """Return the faces of each upright RGB photo, largest first.

        Photos that have the same size when they are searched go through the network together.

        Raises:
            UserError: facenet-pytorch is not installed, or its detector fails on a photo.
        """
        small = [_reduced(photo, self.longest) for photo in photos]
        found = self._turned(small, 0)
        doubtful = [
            i for i in range(len(small)) if self.turned or not all(rank >= SURE for _, rank in found[i] or NONE)
        ]
        for turn in (90, 180, 270) if doubtful and self.turned is not None else ():
            for i, faces in zip(doubtful, self._turned([small[i] for i in doubtful], turn), strict=True):
                found[i] = [*found[i], *faces]
        return [
            [_scaled(face, photo.size, reduced.size) for face in _distinct(faces)]
            for photo, reduced, faces in zip(photos, small, found, strict=True)
        ]

    def _turned(self, photos: list[Image.Image], turn: int) -> list[list[Candidate]]:
        """Turn photos counterclockwise, and return their faces in pixels of the photos before the turn."""
        method = TURNS[turn]
        views = photos if method is None else [photo.transpose(method) for photo in photos]
        found: list[list[Candidate]] = [[] for _ in views]
        for size in {view.size for view in views if min(view.size) >= SMALLEST}:
            group = [i for i, view in enumerate(views) if view.size == size]
            for i, faces in zip(group, self.upright([views[i] for i in group]), strict=True):
                for face in faces:
                    landmarks = _turn_back(face.landmarks, photos[i].size, turn)
                    found[i].append((Face(landmarks, face.score), _rank(face)))
        return found

    def upright(self, views: list[Image.Image]) -> list[list[Face]]:
        """Return the faces of RGB pictures of one size, largest first. Nothing is reduced or turned.

        Raises:
            UserError: see `__call__`.
        """
        try:
            _, scores, points = _mtcnn(self.device).detect(views, landmarks=True)
        except (RuntimeError, IndexError) as error:  # MTCNN fails on some boxes at the border of a picture
            if len(views) > 1:
                return [self.upright([view])[0] for view in views]
            raise UserError(f"{name_of(views[0])}: the face detector fails on this photo ({error}).") from None
        found = []
        for i in range(len(views)):
            pairs = [] if points[i] is None else zip(points[i], scores[i], strict=True)
            faces = [Face(np.asarray(point, np.float64), round(float(score), 4)) for point, score in pairs]
            found.append([face for face in faces if face.score is not None and face.score >= self.score])
        return found


def _reduced(photo: Image.Image, longest: int) -> Image.Image:
    """Return a photo whose longer side has at most `longest` pixels."""
    scale = longest / max(photo.size)
    if scale >= 1:
        return photo
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _scaled(face: Face, size: tuple[int, int], reduced: tuple[int, int]) -> Face:
    """Convert a face from pixels of the reduced photo to pixels of the photo; the centre of the first pixel is 0."""
    return Face(((face.landmarks + 0.5) * np.array(size) / np.array(reduced) - 0.5).round(2), face.score)


def _turn_back(points: np.ndarray, size: tuple[int, int], turn: int) -> np.ndarray:
    """Return where points (N, 2) lay before a picture of this size was turned counterclockwise."""
    x, y = points.T
    right, bottom = size[0] - 1, size[1] - 1
    pairs = {0: (x, y), 90: (right - y, x), 180: (right - x, bottom - y), 270: (y, bottom - x)}
    return np.stack(pairs[turn], axis=1)


def _rank(face: Face) -> tuple[bool, float]:
    """Return how good a detection is: whether the face is nearly upright in the searched picture, and its score."""
    across, down = face.landmarks[1] - face.landmarks[0], face.points[2:].mean(0) - face.points[:2].mean(0)
    return bool(across[0] >= abs(across[1]) and down[1] >= abs(down[0])), face.score or 0.0


def _distinct(faces: list[Candidate]) -> list[Face]:
    """Return the faces, largest first; if several are in the same place, only the best of them."""
    kept: list[Face] = []
    for face, _ in sorted(faces, key=lambda candidate: candidate[1], reverse=True):
        centre = face.points.mean(0)
        if all(np.hypot(*(other.points.mean(0) - centre)) > 0.25 * max(other.side, face.side) for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda face: -face.side)


def detect_faces(
    image: ImageLike, longest: int = 1024, score: float = 0.9, turned: bool = False, device: str = "cpu"
) -> list[Face]:
    """Return the faces in a photo, largest first.

    The network is MTCNN, which finds upright faces. If it finds none or is not sure, the photo is also turned by 90,
    180 and 270 degrees and searched again.

    Args:
        image: path or PIL image; the EXIF orientation is applied.
        longest, score, turned, device: see `Detector`.

    Raises:
        UserError: the image cannot be read, an argument is invalid, or facenet-pytorch is not installed; the message
            contains the command that installs it.

    Source: MTCNN (Zhang et al., arXiv:1604.02878).
    """
    return Detector(longest, score, turned, device)([open_8bit(image, "RGB")])[0]


def check_choice(faces: str | int) -> str | int:
    """Return `faces` as a valid argument `which` of `choose`; a number may be given as text.

    Raises:
        UserError: `faces` is neither one of `CHOICES` nor a number of at least 1.
    """
    if str(faces).isdecimal() and int(faces) >= 1:
        return int(faces)
    if faces not in CHOICES:
        choice("faces", faces, [*CHOICES, "or the number of faces"])
    return faces


def choose(faces: Sequence[Face], which: str | int, size: tuple[int, int]) -> list[Face]:
    """Return the wanted faces, largest first.

    Args:
        faces: faces of one photo.
        which: the wanted faces: `all`, `largest`, `central` (closest to the centre of the photo) or a number n (the n
            largest). Except for `all`, faces that cannot be aligned count only if there are no others.
        size: width and height of the photo.
    """
    ordered = sorted(faces, key=lambda face: -face.side)
    if which == "all":
        return ordered
    usable = [face for face in ordered if face.fault(size) is None] or ordered
    if which == "central":
        centre = np.array(size) / 2
        return sorted(usable, key=lambda face: float(np.hypot(*(np.nanmean(face.points, 0) - centre))))[:1]
    return usable[: 1 if which == "largest" else int(which)]

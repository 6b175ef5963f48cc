"""From photos to aligned faces: the units of work that `psp-align` gives to worker processes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from psp_lightning.data.align import cut_face
from psp_lightning.data.faces import POINTS, Detector, Face, check_choice, choose
from psp_lightning.data.inputs import InputFile
from psp_lightning.data.landmarks import CORNERS, LANDMARKS
from psp_lightning.utils.arguments import choice, whole
from psp_lightning.utils.atomic import DISK
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import FORMATS, save_atomic
from psp_lightning.utils.pictures import open_8bit

LARGEST = 8192  # pixels, the side of a crop


@dataclass(frozen=True)
class Alignment:
    """The settings that determine the crops.

    Args:
        size: height and width of the crops in pixels.
        faces: which faces of a photo, see `psp_lightning.data.faces.choose`.
        format: suffix of the crops.
        detector: finds the faces.

    Raises:
        UserError: an argument is invalid.
    """

    size: int = 256
    faces: str | int = "largest"
    format: str = "png"
    detector: Detector = field(default_factory=Detector)

    def __post_init__(self) -> None:
        whole("size", self.size, 8, LARGEST)
        choice("format", self.format, FORMATS)
        object.__setattr__(self, "faces", check_choice(self.faces))

    @property
    def several(self) -> bool:
        """Whether a photo may have several crops, whose names then end in a number."""
        return self.faces not in ("largest", "central")

    def name(self, photo: str, face: int) -> str:
        """Return the name of a crop, without its suffix."""
        return f"{photo}_{face}" if self.several else photo


class AlignmentUnits(Dataset[list[dict[str, Any]]]):
    """Groups of photos. An item finds the faces in a group, writes the crops and returns what it found.

    The result of a photo contains its `index`, the written `files` as paths below the folder, and `faces`: one row for
    each face, or one row with the status `no face` or `error` and a reason. A row has the columns of the table.

    Args:
        files: the photos.
        units: indices of the photos of each group.
        settings: which faces, and how they are cut out.
        folder: folder of the crops.
        landmarks: the faces of each photo from a landmark file, None for a photo that it does not name. Without this
            argument, the detector searches the photos.
    """

    def __init__(
        self, files: list[InputFile], units: list[list[int]], settings: Alignment, folder: Path,
        landmarks: list[list[Face] | None] | None = None,
    ) -> None:  # fmt: skip
        self.files, self.units, self.settings, self.folder, self.landmarks = files, units, settings, folder, landmarks

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, item: int) -> list[dict[str, Any]]:
        try:
            return self._process(self.units[item])
        except OSError as error:  # a full or failing disk; if raised here, its errno would be lost
            return [{"stop": [error.errno, error.strerror, os.fspath(error.filename or self.folder)]}]

    def _process(self, unit: list[int]) -> list[dict[str, Any]]:
        photos: dict[int, Image.Image] = {}
        reasons: dict[int, str] = {}
        for index in unit:
            try:
                with quiet_about_size():
                    photos[index] = open_8bit(self.files[index].path, "RGB")
            except UserError as error:
                reasons[index] = str(error)
        if self.landmarks is not None:
            found: dict[int, list[Face]] = {index: self.landmarks[index] or [] for index in photos}
        else:
            found = self._detect(photos, reasons)
        results = []
        for index in unit:
            if index in found:
                results.append(self._result(index, photos.pop(index), found[index]))
            else:
                results.append({"index": index, "files": [], "faces": [self._row(index, "error", reasons[index])]})
        return results

    def _detect(self, photos: dict[int, Image.Image], reasons: dict[int, str]) -> dict[int, list[Face]]:
        try:
            return dict(zip(photos, self.settings.detector(list(photos.values())), strict=True))
        except UserError as error:
            if len(photos) == 1:  # find out which photo it is
                reasons.update(dict.fromkeys(photos, str(error)))
                return {}
        found: dict[int, list[Face]] = {}
        for index, photo in photos.items():
            found |= self._detect({index: photo}, reasons)
        return found

    def _row(self, index: int, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        file = self.files[index]
        return {"photo": os.fspath(file.path.relative_to(file.root)), "status": status, "reason": reason, **values}

    def _result(self, index: int, photo: Image.Image, faces: list[Face]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        files: list[str] = []
        chosen = choose(faces, self.settings.faces, photo.size)
        if not chosen:
            lacking = "no face was found"
            if self.landmarks is not None:
                unnamed = self.landmarks[index] is None
                lacking = f"the landmark file {'does not name' if unnamed else 'has no face in'} this photo"
            rows.append(self._row(index, "no face", lacking))
        for k, face in enumerate(chosen):
            row = self._row(index, "ok", face=k, score=face.score)
            row |= _numbers(LANDMARKS, face.landmarks)
            reason = face.fault(photo.size)
            if reason is None:
                name = f"{self.settings.name(self.files[index].name, k)}.{self.settings.format}"
                row |= _numbers(CORNERS, face.corners)
                reason = self._write(photo, face, name)
                if reason is None:
                    files.append(name)
                    row["file"] = name
            rows.append(row if reason is None else {**row, "status": "left out", "reason": reason})
        return {"index": index, "files": files, "faces": rows, "size": list(photo.size)}

    def _write(self, photo: Image.Image, face: Face, name: str) -> str | None:
        """Write a crop; if this fails, return the reason."""
        try:
            crop = cut_face(photo, face.corners, self.settings.size)
            save_atomic(crop, self.folder / name, **FORMATS[self.settings.format])
        except UserError as error:
            return str(error)
        except OSError as error:
            if error.errno in DISK:
                raise
            return f"{self.folder / name} cannot be written: {error.strerror or error}"
        return None


def _numbers(names: list[str], points: Any) -> dict[str, float]:
    """Return the known coordinates of points by name, rounded to a hundredth of a pixel."""
    pairs = zip(names, points.round(2).ravel().tolist(), strict=True)
    return {name: value for name, value in pairs if value == value}


@contextlib.contextmanager
def quiet_about_size() -> Iterator[None]:
    """Suppress Pillow's warning about pictures above 89 megapixels, because photos can be that large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def face_of(row: dict[str, Any]) -> Face:
    """Return the face of a row of the table."""
    return Face(
        np.array([row.get(name, np.nan) for name in LANDMARKS], float).reshape(len(POINTS), 2), row.get("score")
    )

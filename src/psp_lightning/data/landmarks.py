"""Files with the positions of faces: the table that `psp-align` writes, and landmark files from other tools."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from psp_lightning.data.faces import POINTS, Face
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError, clean, plural
from psp_lightning.utils.names import portable

LANDMARKS = [f"{name}_{axis}" for name in POINTS for axis in "xy"]
CORNERS = [f"{corner}_{axis}" for corner in ("upper_left", "lower_left", "lower_right", "upper_right") for axis in "xy"]
COLUMNS = ["photo", "face", "status", "reason", "score", *LANDMARKS, *CORNERS, "file"]
LARGEST_FILE = 1 << 28  # bytes
# The 68 points of dlib and the FFHQ data set: corners and lids of the eyes, tip of the nose, corners of the mouth
OF_68 = (range(36, 42), range(42, 48), [30], [48], [54])


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with the keys `COLUMNS` as csv; missing values stay empty.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows({**row, "photo": portable(row["photo"]), "file": portable(row.get("file", ""))} for row in rows)


class LandmarkFile:
    """The faces in a csv or json file, by photo.

    A csv file has the columns `photo`, `eye_left_x`, `eye_left_y`, ... for `eye_left`, `eye_right`, `mouth_left` and
    `mouth_right`, one row for each face; the columns of `nose` are optional, and others are ignored. `faces.csv` of
    psp-align is such a file. A json file maps each photo to a face or a list of faces. A face is an object with the
    names as keys and [x, y] as values, or a list of 4 points (without the nose), 5 points (with the nose as third) or
    68 points (of dlib).

    A photo is named by its path below the input folder, or by its file name or stem if that is unique among the inputs.
    Positions are in pixels of the upright photo.

    Args:
        path: the file.

    Raises:
        UserError: the file cannot be read or has another layout. The message names the line or the photo.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if self.path.stat().st_size > LARGEST_FILE:
                raise UserError(f"{self.path} is larger than a file of landmarks can be.")
            text = self.path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise UserError(f"landmarks={self.path} cannot be read: {error.strerror}.") from None
        if self.path.suffix.lower() == ".json":
            self.faces = self._json(text)
        elif self.path.suffix.lower() == ".csv":
            self.faces = self._csv(text)
        else:
            raise UserError(f"landmarks={self.path} must end in .csv or .json.")

    def _csv(self, text: str) -> dict[str, list[Face]]:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        wanted = ["photo", *(name for name in LANDMARKS if not name.startswith("nose"))]
        if lacking := [name for name in wanted if name not in (rows.fieldnames or ())]:
            found = clean(", ".join(map(str, rows.fieldnames or ()))) or "none"
            raise UserError(
                f"{self.path} has no column {lacking[0]}. Its columns: {found}. Needed: {', '.join(wanted)}."
            )
        faces: dict[str, list[Face]] = {}
        try:
            for row in rows:
                found_faces = faces.setdefault(row["photo"] or "", [])
                if row.get("status") in ("no face", "error"):  # a row of psp-align that has no face
                    continue
                values = [row.get(name) or "nan" for name in LANDMARKS]
                found_faces.append(self._face(np.reshape(values, (5, 2)), f"line {rows.line_num}"))
        except csv.Error as error:
            raise UserError(f"{self.path}, line {rows.line_num}: this is not csv: {error}.") from None
        return faces

    def _json(self, text: str) -> dict[str, list[Face]]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is not json: {clean(str(error))}.") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.path} must map the names of photos to faces, but it is a {type(content).__name__}.")
        faces = {}
        for photo, value in content.items():
            where = f"photo '{clean(photo)}'"
            many = isinstance(value, list) and (not value or not _is_points(value))
            faces[photo] = [self._face(_five(item), where) for item in (value if many else [value])]
        return faces

    def _face(self, points: Any, where: str) -> Face:
        try:
            landmarks = np.asarray(points, np.float64)
        except (TypeError, ValueError):
            landmarks = np.empty(0)
        if landmarks.shape != (5, 2) or np.isinf(landmarks).any() or np.nanmax(np.abs(landmarks), initial=0) > 1e7:
            raise UserError(
                f"{self.path}, {where}: a face must be {', '.join(POINTS)}, each with x and y in pixels, or a list of "
                "4, 5 or 68 points."
            )
        return Face(landmarks.round(2))

    def match(self, photos: Sequence[str]) -> tuple[list[list[Face] | None], list[str]]:
        """Return the faces of each photo (None if the file does not name it), and the names that fit no photo.

        Args:
            photos: paths of the photos below the input folder.

        Raises:
            UserError: no name fits a photo.
        """
        names: dict[str, list[int]] = {}
        for i, photo in enumerate(map(portable, photos)):
            path = PurePosixPath(photo)
            for name in {photo, path.name, path.stem, path.with_suffix("").as_posix()}:
                names.setdefault(name, []).append(i)
        exact = {portable(photo): i for i, photo in enumerate(photos)}
        found: list[list[Face] | None] = [None] * len(photos)
        unknown = []
        for name, faces in self.faces.items():
            places = [exact[name]] if name in exact else names.get(name, [])
            if len(places) != 1:
                unknown.append(clean(name))
                continue
            found[places[0]] = [*(found[places[0]] or ()), *faces]
        if len(unknown) == len(self.faces):
            raise UserError(
                f"{self.path} names none of the photos. It has {plural(len(unknown), 'name')}, such as "
                f"'{unknown[0] if unknown else ''}'; the first photo is '{clean(photos[0])}'. Name a photo by its path "
                "below the input folder, its file name or its stem."
            )
        return found, unknown


def _is_points(value: list[Any]) -> bool:
    """Return whether a list is one face rather than a list of faces."""
    first = value[0]
    return isinstance(first, list) and bool(first) and isinstance(first[0], int | float)


def _five(value: Any) -> Any:
    """Return the five points of a face in one of the layouts of `LandmarkFile`; anything else unchanged."""
    unknown = [math.nan, math.nan]
    if isinstance(value, dict):
        return [value.get(name) or unknown for name in POINTS]
    if not isinstance(value, list):
        return value
    if len(value) == 4:
        return [*value[:2], unknown, *value[2:]]
    if len(value) == 68:
        try:
            points = np.asarray(value, np.float64)
            return [points[list(part)].mean(0) for part in OF_68]
        except (TypeError, ValueError, IndexError):
            return value
    return value

"""docs/photos.md shows the stored measurement of psp-align, and the measurement counts right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.photos import FEW, PAGE, RESULTS, SETTINGS, Known, compare, make_photo, page, sources, watch
from psp_lightning.data.landmarks import LANDMARKS, write_table


def test_the_page_shows_the_measurement() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, results) == text, "run python -m benchmarks.photos --page"
    assert results["photos"] == 500 and results["settings"] == SETTINGS
    assert results["sources"] == 5, "scikit-image was not installed"
    assert results["same_files_after_kill"] and 0 < results["killed_after"] < 500
    cells = [cell for row in results["groups"].values() for cell in row.values()]
    assert sum(cell["known"] for cell in cells) == results["known"]
    assert sum(cell["found"] for cell in cells) == results["found"]


def test_the_memory_hardly_grew_with_the_number_of_photos() -> None:
    """Larger photos come later, so it is not equal."""
    peak = json.loads(RESULTS.read_text(encoding="utf-8"))["peak_mib"]
    assert peak["500"] < 1.25 * peak[str(FEW)], peak


def test_photos_depend_on_seed_and_number() -> None:
    faces = sources()
    first, again, other = (make_photo(faces, seed, 2) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0])
    assert first[0].size != other[0].size or not np.array_equal(first[0], other[0])


def test_known_faces_are_where_the_detector_finds_them() -> None:
    pytest.importorskip("facenet_pytorch")
    from psp_lightning.data.faces import detect_faces

    photo, known = make_photo(sources(), 0, 1)
    (face,) = known
    found = detect_faces(photo)[0]
    error = np.hypot(*(found.points - face.points).T).max() / np.hypot(*(face.points[1] - face.points[0]))
    assert error < 0.1, f"the positions differ by {error:.2f} of the distance of the eyes"


def test_faces_are_counted(tmp_path: Path) -> None:
    face = np.array([[40, 40], [60, 40], [50, 50], [42, 60], [58, 60]], float)
    rows = {"right": face + 1, "upside down": face[::-1], "elsewhere": face + 500}
    known = {name: [Known(face[[0, 1, 3, 4]], 30.0, 50.0)] for name in (*rows, "missed")}
    write_table(
        tmp_path / "faces.csv",
        [
            {"photo": name, "status": "ok", **dict(zip(LANDMARKS, points.ravel(), strict=True))}
            for name, points in rows.items()
        ],
    )
    found = compare(known, tmp_path / "faces.csv")
    assert (found["known"], found["found"], found["misplaced"], found["strange"]) == (4, 1, 1, 1)
    assert found["groups"]["20° to 45°"]["40 to 80"] == {"known": 4, "found": 1}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from /proc")
def test_a_command_is_watched_and_killed(tmp_path: Path) -> None:
    code = "import time; x = bytearray(200 << 20); time.sleep(1)"
    ended = watch([sys.executable, "-c", code], tmp_path)
    assert ended["code"] == 0 and 200 < ended["all"] < 300 and ended["seconds"] > 1
    killed = watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, done=lambda: 5, stop=3)
    assert killed == {"code": -9, "done": 5}

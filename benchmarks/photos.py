"""Measure psp-align on photos in which every face is known: `python -m benchmarks.photos`, about half an hour on Linux.

The photos are collages of a few real faces, scaled and rotated, on a blurred mosaic of small pieces of the same faces.
psp-align runs on all photos with two processes. It then runs with another output folder, is killed half-way, and is
started again. The numbers go to benchmarks/results/photos.json, and the table in docs/photos.md is made from them:
`--page` only writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.compare.machine import describe
from psp_lightning.data.align import crop_corners
from psp_lightning.data.alignment import face_of
from psp_lightning.utils.atomic import replacing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "photos.json"
PAGE = ROOT / "docs" / "photos.md"
BEGIN, END = "<!-- found: begin -->", "<!-- found: end -->"
# eyes and corners of the mouth, found by the detector in the photos themselves and checked by eye
FACES = {
    "face_0.jpg": [[197, 231], [320, 243], [200, 364], [325, 377]],
    "face_1.jpg": [[191, 238], [325, 240], [205, 382], [320, 380]],
    "face_2.jpg": [[192, 239], [316, 237], [198, 387], [302, 385]],
    "input_img.jpg": [[381, 484], [644, 482], [385, 756], [636, 750]],
    "astronaut": [[205, 102], [247, 104], [202, 139], [245, 142]],
}
SIZES = [(640, 480), (480, 640), (1024, 768), (1200, 1600), (2400, 1600)]
PIECE = 24  # pixels, the side of the background's pieces, which are too small to show a face
FEW = 100  # photos; the peak memory until this many are done is recorded separately
SEARCHED = 1024  # pixels, psp-align's default `longest`
SETTINGS = ["faces=all", "workers=2", "progress_bar=false"]
ROTATIONS = {"up to 20°": 20, "20° to 45°": 45, "more": 180}
WIDTHS = {"below 20": 20.0, "20 to 40": 40.0, "40 to 80": 80.0, "over 80": np.inf}


@dataclass
class Known:
    """A face in a photo.

    Attributes:
        points: eyes and corners of the mouth in pixels, float64 (4, 2).
        rotation: rotation in degrees, counterclockwise, -180 to 180.
        width: width of the face, taken as half the side of its FFHQ crop, in pixels of the photo as it is searched.
    """

    points: np.ndarray
    rotation: float
    width: float


def sources() -> list[tuple[Image.Image, np.ndarray]]:
    """Return the real faces with a margin, and their points; the astronaut only if scikit-image is installed."""
    found = []
    for name, points in FACES.items():
        try:
            if name == "astronaut":
                from skimage.data import astronaut

                photo = Image.fromarray(astronaut())
            else:
                photo = Image.open(ROOT / "tests/data/photos" / name).convert("RGB")
        except ImportError:
            continue
        quad = crop_corners(*points)
        half = np.hypot(*(quad[3] - quad[0])) / 2
        low = np.maximum(quad.mean(0) - half, 0).astype(int)
        high = np.minimum(quad.mean(0) + half, photo.size).astype(int)
        found.append((photo.crop((*low.tolist(), *high.tolist())), np.array(points, float) - low))
    return found


def make_photo(faces: list[tuple[Image.Image, np.ndarray]], seed: int, index: int) -> tuple[Image.Image, list[Known]]:
    """Return photo number `index`, which depends only on the arguments, and the faces in it."""
    rng = np.random.default_rng([seed, index])
    width, height = SIZES[rng.integers(len(SIZES))]
    photo = _mosaic([face for face, _ in faces], width, height, rng)
    rows = rng.choice([1, 2, 3, 6], p=[0.5, 0.2, 0.2, 0.1])  # rows of faces along the shorter side
    cell = min(width, height) // rows
    kind = rng.choice(["upright", "tilted", "turned", "any"], p=[0.6, 0.2, 0.1, 0.1])
    turn = float(rng.choice([90, 180, 270]))  # rotation of the whole photo, if it is turned
    known = []
    for place in np.ndindex(width // cell, height // cell) if rows > 1 else [(0, 0)]:
        if rows > 1 and rng.random() < 0.5:
            continue
        within = {"upright": 20, "tilted": 45, "turned": 20, "any": 180}[kind]
        angle = rng.uniform(-within, within) + (turn if kind == "turned" else 0)
        fits = cell / sum(map(abs, (np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle)))))
        face, points = faces[rng.integers(len(faces))]
        scale = fits * rng.uniform(0.35, 0.95) / max(face.size)
        known.append(_put(photo, face, points, scale, angle, (np.array(place) + 0.5) * cell))
    return photo, known


def _mosaic(pictures: list[Image.Image], width: int, height: int, rng: np.random.Generator) -> Image.Image:
    photo = Image.new("RGB", (width, height))
    for x in range(0, width, PIECE):
        for y in range(0, height, PIECE):
            picture = pictures[rng.integers(len(pictures))]
            left, top = (int(rng.integers(side - PIECE)) for side in picture.size)
            photo.paste(picture.crop((left, top, left + PIECE, top + PIECE)), (x, y))
    return photo.filter(ImageFilter.GaussianBlur(12))


def _put(
    photo: Image.Image, face: Image.Image, points: np.ndarray, scale: float, angle: float, centre: np.ndarray
) -> Known:
    """Paste a face, scaled and rotated counterclockwise, and return where it is."""
    size = tuple(max(1, round(side * scale)) for side in face.size)
    small = face.resize(size, Image.Resampling.LANCZOS)
    shape = Image.new("L", size, 255).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    turned = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    corner = np.round(centre - np.array(turned.size) / 2).astype(int)
    photo.paste(turned, tuple(corner.tolist()), shape)
    x, y = ((points + 0.5) * np.array(size) / np.array(face.size) - np.array(size) / 2).T
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    placed = np.stack([cos * x + sin * y, cos * y - sin * x], axis=1) + corner + np.array(turned.size) / 2 - 0.5
    width = np.hypot(*np.diff(crop_corners(*placed)[[0, 3]], axis=0)[0]) / 2
    return Known(placed, (angle + 180) % 360 - 180, width * min(1, SEARCHED / max(photo.size)))


def peak_memory(process: int) -> int:
    """Return the peak memory in MiB of a process or its children, whichever is largest; 0 if all have ended."""
    peaks = [0]
    with contextlib.suppress(OSError):  # they may end at any time
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for number in (process, *children):
            status = Path(f"/proc/{number}/status").read_text().splitlines()
            peaks += [int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")]
    return max(peaks)


def watch(command: list[str], folder: Path, done: Callable[[], int] = int, stop: int | None = None) -> dict[str, Any]:
    """Run a command and watch its memory.

    Args:
        command: the command and its arguments.
        folder: working folder.
        done: function that returns how many photos are done.
        stop: number of photos after which all processes of the command are killed; None: kill none.

    Returns:
        `code`, the exit status; `seconds`, the wall time; `few` and `all`, the peak memory in MiB of its largest
        process until `FEW` photos were done and until it ended. If it was killed, only `code` and `done`, the number of
        photos that were done.
    """
    start, few, peak, number = time.perf_counter(), 0, 0, 0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        number = max(number, done())
        few = peak if number <= FEW else few
        if stop is not None and number >= stop:
            os.killpg(process.pid, signal.SIGKILL)
            return {"code": process.wait(), "done": number}
        time.sleep(0.1)
    return {"code": process.returncode, "seconds": time.perf_counter() - start, "few": few, "all": peak}


def align(folder: Path, output: str, n: int, stop: int | None = None) -> dict[str, Any]:
    """Run psp-align on `n` photos; see `watch`."""

    def done(manifest: Path = folder / output / "manifest.jsonl") -> int:
        return max(0, manifest.read_bytes().count(b"\n") - n) if manifest.is_file() else 0  # n lines say what to do

    command = [sys.executable, "-m", "psp_lightning.cli.align", "input=photos", f"output={output}", *SETTINGS]
    return watch(command, folder, done, stop)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the crops and the table, by name."""
    files = [path for path in folder.rglob("*") if path.suffix in (".png", ".csv")]
    return {os.fspath(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compare(known: dict[str, list[Known]], table: Path) -> dict[str, Any]:
    """Return how many of the known faces are in a table, and how many faces of the table are not known.

    A face is found if both eyes and both corners of the mouth are off by at most half the distance between its eyes. It
    is misplaced if only its centre is near the true one, and otherwise it is missed.
    """
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] in ("ok", "left out")]
    found: dict[str, list[np.ndarray]] = {name: [] for name in known}
    for row in rows:
        values = {key: float(value) for key, value in row.items() if key.endswith(("_x", "_y")) and value}
        found[row["photo"]].append(face_of(values).points)
    total: Counter[tuple[str, str]] = Counter()
    right: Counter[tuple[str, str]] = Counter()
    misplaced, strange, errors = 0, 0, []
    for name, faces in known.items():
        left = list(found[name])
        for face in faces:
            group = _group(ROTATIONS, abs(face.rotation)), _group(WIDTHS, face.width)
            total[group] += 1
            eyes = np.hypot(*(face.points[1] - face.points[0]))
            near = [p for p in left if np.hypot(*(p.mean(0) - face.points.mean(0))) < eyes]
            left = [p for p in left if not any(p is other for other in near)]
            error = min((np.hypot(*(p - face.points).T).max() / eyes for p in near), default=np.inf)
            if error <= 0.5:
                right[group] += 1
                errors.append(error)
            misplaced += int(bool(near) and error > 0.5)
        strange += len(left)
    groups = [[{"known": total[r, w], "found": right[r, w]} for w in WIDTHS] for r in ROTATIONS]
    n = sum(total.values())
    return {
        "known": n, "found": sum(right.values()), "misplaced": misplaced, "strange": strange,
        "median_error": round(float(np.median(errors)), 3) if errors else None,
        "groups": {r: dict(zip(WIDTHS, row, strict=True)) for r, row in zip(ROTATIONS, groups, strict=True)},
    }  # fmt: skip


def _group(limits: dict[str, Any], value: float) -> str:
    return next(name for name, limit in limits.items() if value <= limit)


def measure(folder: Path, n: int, seed: int, busy: bool) -> dict[str, Any]:
    """Make the photos, measure the calls of psp-align, and return all numbers."""
    faces = sources()
    (folder / "photos").mkdir()
    known = {}
    for index in range(n):
        photo, known[f"{index:03}.jpg"] = make_photo(faces, seed, index)
        photo.save(folder / "photos" / f"{index:03}.jpg", quality=92)
    print(f"{sum(map(len, known.values()))} faces in {n} photos", flush=True)
    whole = align(folder, "whole", n)
    result = compare(known, folder / "whole" / "faces.csv")
    print(f"{whole['seconds'] / n:.2f} s per photo, {result['found']} faces found", flush=True)
    killed = align(folder, "parts", n, stop=n // 2)
    again = align(folder, "parts", n)
    same = digests(folder / "whole") == digests(folder / "parts") and again["code"] == whole["code"]
    return {
        "machine": describe("cpu"), "settings": SETTINGS, "other_work": busy, "photos": n, "seed": seed,
        "sources": len(faces), "seconds_per_photo": round(whole["seconds"] / n, 2),
        "peak_mib": {str(FEW): whole["few"], str(n): whole["all"]},
        "killed_after": killed["done"], "same_files_after_kill": same, **result,
    }  # fmt: skip


def page(text: str, results: dict[str, Any]) -> str:
    """Return the text of the page with the results between their marks."""
    (few, few_peak), (_, peak) = results["peak_mib"].items()
    busy = results["other_work"]
    place = f"two cores ({results['machine']['processor']}{'; busy with other work' if busy else ''})"
    summary = (
        f"In all, {results['found']:,} of {results['known']:,} faces are found. {results['misplaced']} faces are found "
        f"with wrong positions, and {results['strange']} other detections are not faces. Half of the faces have no "
        f"position that is off by more than {results['median_error']:.0%} of the distance between the eyes. A photo "
        f"takes {'at most ' if busy else ''}{results['seconds_per_photo']:.1f} s on {place}. The largest process needs "
        f"at most {few_peak} MiB for {few} photos and {peak} MiB for all. If the command is killed after "
        f"{results['killed_after']} photos and started again, it "
        f"{'writes' if results['same_files_after_kill'] else 'does not write'} the same bytes."
    )
    lines = [
        "| Rotation | " + " | ".join(f"{name} px" for name in WIDTHS) + " |",
        "|---" * (1 + len(WIDTHS)) + "|",
        *(
            f"| {rotation} | " + " | ".join(f"{cell['found']} of {cell['known']}" for cell in cells.values()) + " |"
            for rotation, cells in results["groups"].items()
        ),
        "",
        *textwrap.wrap(summary, 120, break_long_words=False, break_on_hyphens=False),
    ]
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measure, or only write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.photos", description=__doc__)
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", action="store_true", help="other work runs at the same time; the page then says so")
    parser.add_argument("--page", action="store_true", help="only write the page from the stored numbers")
    given = parser.parse_args()
    if not given.page:
        folder = Path(tempfile.mkdtemp(prefix="photos"))
        try:
            results = measure(folder, given.photos, given.seed, given.busy)
        finally:
            shutil.rmtree(folder)
        with replacing(RESULTS) as part:
            part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8")))
    with replacing(PAGE) as part:
        part.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

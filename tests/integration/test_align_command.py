"""psp-align writes the crops and the table, whatever the photos are, and continues after an interruption."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_lightning.data.align import align_face

pytest.importorskip("facenet_pytorch")
POINTS = [[197.2, 230.8], [320.3, 242.6], [200.4, 364.3], [324.8, 376.7]]  # of face_0.jpg


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "faces.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def crops(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def crowd(photos: Path, n: int = 4, side: int = 200, rows: int | None = None) -> Image.Image:
    """Return a photo with `rows` (by default n) rows of n faces."""
    face = Image.open(photos / "face_2.jpg").convert("RGB").resize((side, side))
    picture = Image.new("RGB", (n * side, (rows or n) * side))
    for x, y in np.ndindex(n, rows or n):
        picture.paste(face, (x * side, y * side))
    return picture


def test_photos(psp, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "more").mkdir()
    shutil.move(tmp_path / "photos" / "face_1.jpg", tmp_path / "photos" / "more")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    done = psp("align", "input=photos", "output=out", "sheet=true", "workers=0")
    assert done.code == 1, "a photo without a face and one that cannot be read"
    assert "5 faces, 1 photo without a face, 1 photo failed in 7 photos; out/faces.csv" in done.out
    assert "error: input_mask.png: no face was found" in done.err and "Cannot read image photos/broken.jpg" in done.err
    rows = {row["photo"]: row for row in table(tmp_path / "out")}
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "broken.jpg": "error", "face_0.jpg": "ok", "face_2.jpg": "ok", "input_img.jpg": "ok",
        "input_mask.png": "no face", "input_sketch.jpg": "ok", "more/face_1.jpg": "ok",
    }  # fmt: skip
    row = rows["more/face_1.jpg"]
    points = [
        (float(row[f"{name}_x"]), float(row[f"{name}_y"]))
        for name in ("eye_left", "eye_right", "mouth_left", "mouth_right")
    ]
    expected = align_face(tmp_path / "photos" / "more" / "face_1.jpg", *points)
    assert row["file"] == "more/face_1.png"
    assert np.array_equal(Image.open(tmp_path / "out" / row["file"]), expected), "the table does not give the crop"
    assert Image.open(tmp_path / "out" / "sheet.png").width > 5 * 128

    before = crops(tmp_path / "out")
    again = psp("align", "input=photos", "output=out", "workers=0")
    assert "6 photos skipped" in again.out and again.code == 1 and crops(tmp_path / "out") == before
    other = psp("align", "input=photos", "output=out", "workers=0", "size=128")
    assert other.code == 1 and "5 outputs exist already" in other.err and "size=256, not size=128" in other.err
    replaced = psp("align", "input=photos", "output=out", "workers=0", "size=128", "overwrite=true")
    assert "5 faces" in replaced.out and Image.open(tmp_path / "out" / "face_0.png").size == (128, 128)


def test_several_faces(psp, photos, tmp_path):
    crowd(photos).save(tmp_path / "crowd.png")
    done = psp("align", "input=crowd.png", "output=out", "faces=all", "size=64", "workers=0")
    assert done.code == 0 and "16 faces in 1 photo" in done.out, done.err
    names = {f"crowd_{k}.png" for k in range(16)}
    assert set(crops(tmp_path / "out")) == names == {row["file"] for row in table(tmp_path / "out")}

    crowd(photos, 2, 400).save(tmp_path / "crowd.png")  # a photo that has changed, with fewer faces
    done = psp("align", "input=crowd.png", "output=out", "faces=all", "size=64", "workers=0")
    assert done.code == 0 and len(crops(tmp_path / "out")) == 4
    done = psp("align", "input=crowd.png", "output=three", "faces=3", "size=64", "workers=0")
    assert set(crops(tmp_path / "three")) == {f"crowd_{k}.png" for k in range(3)}
    done = psp("align", "input=crowd.png", "output=central", "faces=central", "size=64", "workers=0")
    assert set(crops(tmp_path / "central")) == {"crowd.png"}


@pytest.mark.slow
def test_200_faces(psp, photos, tmp_path):
    crowd(photos, 20, 100, rows=10).save(tmp_path / "crowd.png")
    done = psp("align", "input=crowd.png", "output=out", "faces=all", "size=64", "workers=0")
    assert done.code == 0 and "200 faces in 1 photo" in done.out, done.err
    noses = {(float(row["nose_x"]) // 100, float(row["nose_y"]) // 100) for row in table(tmp_path / "out")}
    assert noses == set(np.ndindex(20, 10)), "not one face in each place"
    assert len(crops(tmp_path / "out")) == 200


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from /proc")
@pytest.mark.parametrize(
    ("command", "name"),
    [("align", "colour.jpg"), ("align", "turned.jpg"), ("align", "cmyk.jpg"), ("align", "grey.png"),
     ("predict", "cmyk.jpg")],
)  # fmt: skip
def test_100_megapixels_take_less_than_1_5_gb(photos, tmp_path, command, name):
    from benchmarks.photos import watch

    photo = Image.new("RGB", (11600, 8700), "gray")
    photo.paste(Image.open(photos / "face_0.jpg").resize((4000, 4000)), (3000, 2000))
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
        photo = photo.transpose(Image.Transpose.ROTATE_90)
    if name == "cmyk.jpg":
        photo = photo.convert("CMYK")
    if name == "grey.png":
        photo = Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * np.uint16(257))
    photo.save(tmp_path / name, exif=exif, compress_level=1)
    settings = {
        "align": ["workers=1"],
        "predict": ["ckpt=toyfaces/inversion", "align=true", "paste_back=true", "num_workers=1", "accelerator=cpu"],
    }[command]
    program = [
        sys.executable,
        "-m",
        f"psp_lightning.cli.{command}",
        f"input={name}",
        "output=out",
        "progress_bar=false",
    ]
    found = watch([*program, *settings], tmp_path)
    (row,) = table(tmp_path / "out" / ("" if command == "align" else "aligned"))
    assert found["code"] == 0 and abs(float(row["eye_left_x"]) - 3000 - 197 * 4000 / 512) < 30, row
    assert found["all"] * 2**20 < 1.5e9, f"{found['all']} MiB"


def test_workers_keep_few_compiled_operations(psp, photos, tmp_path, monkeypatch):
    class Detector:
        def detect(self, views, landmarks):
            raise IndexError(f"capacity {os.environ.get('ONEDNN_PRIMITIVE_CACHE_CAPACITY')}")

    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setattr("psp_lightning.data.faces._mtcnn", lambda device: Detector())
    shutil.copy(photos / "face_0.jpg", tmp_path)
    done = psp("align", "input=face_0.jpg", "output=out", "workers=1", "progress_bar=false")
    assert done.code == 1 and "(capacity 16)" in done.err, "memory would grow with the number of sizes of photos"
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ, "a network in this process would become slower"


def test_landmark_files(psp, photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "photos")
    points = {
        "face_0": POINTS, "face_1.jpg": [[9000, 1], *POINTS[1:]], "face_2": {"eye_left": POINTS[0]}, "stranger": POINTS,
        "input_img": [],
    }  # fmt: skip
    (tmp_path / "points.json").write_text(json.dumps(points))
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)  # it is not needed
    done = psp("align", "input=photos", "output=out", "landmarks=points.json", "workers=0")
    assert done.code == 1
    for message in (
        "face_1.jpg, face 0: eye_left at (9000, 1) lies outside the photo of 512 x 512 pixels",
        "face_2.jpg, face 0: the position of eye_right is not known",
        "input_img.jpg: the landmark file has no face in this photo",
        "input_sketch.jpg: the landmark file does not name this photo",
        "the landmark file has 1 name that fit no photo, or several: 'stranger'",
    ):
        assert message in done.err
    assert "1 face, 2 left out, 3 photos without a face in 6 photos" in done.out
    expected = align_face(tmp_path / "photos" / "face_0.jpg", *POINTS)
    assert np.array_equal(Image.open(tmp_path / "out" / "face_0.png"), expected)

    again = psp("align", "input=photos", "output=again", "landmarks=out/faces.csv", "workers=0")
    assert crops(tmp_path / "again") == crops(tmp_path / "out") and again.code == 1

    (tmp_path / "others.json").write_text(json.dumps({"stranger": POINTS, "friend.jpg": POINTS}))
    others = psp("align", "input=photos", "output=none", "landmarks=others.json", "workers=0")
    assert others.code == 1 and not (tmp_path / "none").exists()
    assert "others.json names none of the photos. It has 2 names, such as 'stranger'" in others.err

    points["face_0"] = [[x + 3, y] for x, y in POINTS]
    (tmp_path / "points.json").write_text(json.dumps(points))
    changed = psp("align", "input=photos", "output=out", "landmarks=points.json", "workers=0")
    assert "5 photos skipped" in changed.out and crops(tmp_path / "again") != crops(tmp_path / "out")


def test_odd_pictures(psp, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    face = Image.open(photos / "face_0.jpg").convert("RGB")
    face.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    grey = np.asarray(face.convert("L"), np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    portrait, landscape = Image.new("RGB", (600, 1100)), Image.new("RGB", (1100, 600))
    portrait.paste(face, (40, 500))
    landscape.paste(face, (500, 40))
    portrait.save(folder / "portrait.png")
    landscape.save(folder / "landscape.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (4000, 3)).save(folder / "line.png")
    done = psp("align", "input=photos", "output=out", "workers=0")
    status = {row["photo"]: row["status"] for row in table(tmp_path / "out")}
    good = ("cmyk.jpg", "deep.png", "landscape.png", "portrait.png")
    assert status == {**dict.fromkeys(good, "ok"), "line.png": "no face", "pixel.png": "no face"}, done.err
    assert done.code == 1 and "4 faces, 2 photos without a face in 6 photos" in done.out
    assert np.asarray(Image.open(tmp_path / "out" / "deep.png")).std() > 30


def test_mistakes(psp, photos, tmp_path):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "face_0.png").write_bytes(b"mine")
    for arguments, message in (
        (["input=face_0.jpg", "output=out"], "out/face_0.png has no record in manifest.jsonl"),
        (["input=none", "output=out"], "input=none does not exist"),
        (["input=face_0.jpg", "output=new", "faces=bigest"], "Did you mean 'largest'"),
        (["input=face_0.jpg", "output=new", "size=4"], "size=4 must be a whole number, from 8 to 8192"),
        (["input=face_0.jpg", "output=new", "device=cuda:99"], "device=cuda:99 cannot be used"),
        (["input=face_0.jpg", "output=new", "landmarks=none.csv"], "landmarks=none.csv cannot be read"),
        (["input=face_0.jpg", "output=face_0.jpg"], "cannot be written"),
    ):
        done = psp("align", *arguments)
        assert done.code == 1 and message in done.err, (arguments, done.err)
        assert "Traceback" not in done.err
    assert (tmp_path / "out" / "face_0.png").read_bytes() == b"mine" and not (tmp_path / "new").exists()


def test_missing_package(psp, photos, tmp_path, monkeypatch):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    done = psp("align", "input=face_0.jpg", "output=out")
    assert done.code == 1 and done.err.count("\n") == 1 and "pip install --no-deps facenet-pytorch==2.6.0" in done.err


@pytest.mark.slow
def test_going_on_after_a_kill_gives_the_same_files(shell, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    picture = crowd(photos, 2)
    for i in range(12):
        picture.rotate(2 * i - 12).save(tmp_path / "photos" / f"{i}.png")
    settings = ["input=photos", "faces=all", "size=128", "workers=2", "batch_size=2", "progress_bar=false"]
    whole = shell("align", *settings, "output=whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "psp_lightning.cli.align", *settings, "output=parts"], cwd=tmp_path, env=dict(os.environ)
    )
    deadline = time.time() + 120
    while len(list((tmp_path / "parts").rglob("[!.]*.png"))) < 5:  # the hidden ones are being written
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "faces.csv").exists()
    done = shell("align", *settings, "output=parts")
    assert (done.code, done.err) == (whole.code, whole.err)
    assert crops(tmp_path / "parts") == crops(tmp_path / "whole") and len(crops(tmp_path / "whole")) >= 40
    assert (tmp_path / "parts" / "faces.csv").read_bytes() == (tmp_path / "whole" / "faces.csv").read_bytes()

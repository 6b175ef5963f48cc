"""Faces are found where they are, chosen as asked, and their positions are read from files."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from psp_lightning.data.align import align_face
from psp_lightning.data.faces import POINTS, Detector, Face, check_choice, choose, detect_faces
from psp_lightning.data.landmarks import COLUMNS, LANDMARKS, LandmarkFile, write_table
from psp_lightning.utils.errors import UserError

PHOTOS = ["face_0.jpg", "face_1.jpg", "face_2.jpg", "input_img.jpg", "input_sketch.jpg"]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    pytest.importorskip("facenet_pytorch")
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


@pytest.fixture(scope="module")
def known(reference: dict[str, np.ndarray]) -> np.ndarray:
    """Return the astronaut's eyes and corners of the mouth, (4, 2)."""
    return reference["align.eye_left_right_mouth_left_right"]


def distance(face: Face, known: np.ndarray) -> float:
    """Return the largest distance of a face's positions from the known ones, in distances of the eyes."""
    return float(np.hypot(*(face.points - known).T).max() / np.hypot(*(known[1] - known[0])))


def synthetic(x: float = 0, y: float = 0, scale: float = 1, nose: float = 0.5) -> Face:
    """Return a face whose eyes are 40 * scale apart; `nose` is its place between them."""
    points = np.array([[30, 40], [70, 40], [30 + 40 * nose, 60], [35, 80], [65, 80]], float)
    return Face(points * scale + [x, y], 0.99)


def test_astronaut(astronaut, known, reference):
    (face,) = detect_faces(astronaut)
    assert distance(face, known) < 0.01 and face.score > 0.99
    golden = reference["align.crop256_stride4"].astype(int)
    crop = align_face(astronaut, *known)
    assert abs(np.asarray(crop)[::4, ::4].astype(int) - golden).max() <= 1
    detected = align_face(astronaut, *face.points)
    assert abs(np.asarray(detected).astype(int) - np.asarray(crop).astype(int)).mean() < 2


@pytest.mark.parametrize("name", PHOTOS)
def test_photos(photos, name):
    pytest.importorskip("facenet_pytorch")
    found = detect_faces(photos / name)
    assert len(found) == 1, f"{len(found)} faces in {name}"
    with Image.open(photos / name) as photo:
        assert found[0].fault(photo.size) is None


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_turned_photos(astronaut, known, turn):
    view = astronaut.rotate(turn, expand=True)  # something else in it has the score 0.97 if it is turned by 270 degrees
    face = detect_faces(view)[0]
    crop = np.asarray(align_face(view, *face.points), int)
    assert abs(crop - np.asarray(align_face(astronaut, *known), int)).mean() < 3, "the crop is not upright"


def test_upright_and_turned_faces_in_one_photo(astronaut):
    both = Image.new("RGB", (1024, 512))
    both.paste(astronaut, (0, 0))
    both.paste(astronaut.rotate(180), (512, 0))
    assert len(detect_faces(both, score=0.99)) == 1
    assert len(detect_faces(both, score=0.99, turned=True)) == 2


def test_exif_orientation(astronaut, known, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    astronaut.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    (face,) = detect_faces(tmp_path / "a.png")
    assert distance(face, known) < 0.01


def test_large_photos_are_searched_at_a_reduced_size(astronaut, known):
    large = astronaut.resize((2048, 2048), Image.Resampling.BICUBIC)
    (face,) = detect_faces(large, longest=512)
    assert distance(face, (known + 0.5) * 4 - 0.5) < 0.02


def test_several_photos_at_once(astronaut, photos):
    pictures = [astronaut, Image.open(photos / "face_0.jpg").convert("RGB"), astronaut, Image.new("RGB", (1, 1))]
    found = Detector()(pictures)
    assert [len(faces) for faces in found] == [1, 1, 1, 0]
    assert np.allclose(found[0][0].landmarks, found[2][0].landmarks, atol=0.02)


@pytest.mark.parametrize("size", [(1, 1), (19, 300), (3000, 2), (64, 64)])
def test_pictures_without_faces(size):
    pytest.importorskip("facenet_pytorch")
    assert detect_faces(Image.new("RGB", size, "gray")) == []


def test_missing_package(monkeypatch):
    from psp_lightning.data.faces import _mtcnn

    _mtcnn.cache_clear()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="pip install --no-deps facenet-pytorch==2.6.0"):
        detect_faces(Image.new("RGB", (64, 64)))


def test_failures_of_the_detector_name_the_photo(monkeypatch):
    pytest.importorskip("facenet_pytorch")
    from psp_lightning.data import faces

    class Broken:
        def detect(self, views, landmarks):
            raise IndexError("mask")

    monkeypatch.setattr(faces, "_mtcnn", lambda device: Broken())
    with pytest.raises(UserError, match="image: the face detector fails on this photo"):
        detect_faces(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(("argument", "value"), [("longest", 5), ("score", 2), ("score", "high")])
def test_invalid_arguments(argument, value):
    with pytest.raises(UserError, match=argument):
        Detector(**{argument: value})


def test_faults():
    size = (100, 100)
    assert synthetic().fault(size) is None
    assert "lies outside the photo of 100 x 100" in synthetic(x=-40).fault(size)
    assert "only one eye" in synthetic(nose=-0.6).fault(size) and "only one eye" in synthetic(nose=1.6).fault(size)
    assert synthetic(nose=1.2).fault(size) is None
    unknown = synthetic().landmarks.copy()
    unknown[1] = np.nan
    assert Face(unknown).fault(size) == "the position of eye_right is not known"
    unknown = synthetic().landmarks.copy()
    unknown[2] = np.nan
    assert Face(unknown).fault(size) is None, "the nose is not needed"
    assert Face(np.full((5, 2), 7.0)).fault(size) == "the points do not form a face"


def test_choice():
    small, large, hidden = synthetic(150, 50, 0.5), synthetic(0, 0), synthetic(20, 20, 1.5, nose=3)
    faces, size = [small, hidden, large], (400, 150)
    assert choose(faces, "all", size) == [hidden, large, small]
    assert choose(faces, "largest", size) == [large] and choose(faces, 2, size) == [large, small]
    assert choose(faces, "central", size) == [small]
    assert choose([hidden], "largest", size) == [hidden] and choose([], 3, size) == []
    assert check_choice("3") == 3 and check_choice("all") == "all"
    with pytest.raises(UserError, match="faces=bigest is unknown. Did you mean 'largest'"):
        check_choice("bigest")
    with pytest.raises(UserError, match="faces=0"):
        check_choice("0")


# --- files of landmarks


def test_the_table_can_be_read_again(tmp_path):
    face = synthetic()
    row = {"photo": "a/b.jpg", "face": 0, "status": "ok", **dict(zip(LANDMARKS, face.landmarks.ravel(), strict=True))}
    write_table(tmp_path / "faces.csv", [row, {"photo": "c.jpg", "status": "no face"}])
    with (tmp_path / "faces.csv").open() as file:
        assert next(csv.reader(file)) == COLUMNS
    found, unknown = LandmarkFile(tmp_path / "faces.csv").match(["a/b.jpg", "c.jpg", "d.jpg"])
    assert np.array_equal(found[0][0].landmarks, face.landmarks)
    assert found[1:] == [[], None] and not unknown


@pytest.mark.parametrize("kind", ["names", "4", "5", "68", "list"])
def test_json(tmp_path, kind):
    points = synthetic().landmarks
    if kind == "68":
        value = np.zeros((68, 2))
        value[36:42], value[42:48], value[30], value[48], value[54] = points
        value = value.tolist()
    else:
        value = {
            "names": {name: point.tolist() for name, point in zip(POINTS, points, strict=True) if name != "nose"},
            "4": points[[0, 1, 3, 4]].tolist(),
            "5": points.tolist(),
            "list": [points.tolist(), points.tolist()],
        }[kind]
    (tmp_path / "p.json").write_text(json.dumps({"photo": value}))
    (found,), _ = LandmarkFile(tmp_path / "p.json").match(["x/photo.jpg"])
    assert len(found) == (2 if kind == "list" else 1)
    assert np.array_equal(found[0].points, points[[0, 1, 3, 4]])


def test_names_of_photos(tmp_path):
    points = synthetic().points.tolist()
    (tmp_path / "p.json").write_text(json.dumps({"a/x.jpg": points, "y": points, "z": points, "other": points}))
    found, unknown = LandmarkFile(tmp_path / "p.json").match(["a/x.jpg", "b/x.jpg", "b/y.png", "a/z.jpg", "b/z.jpg"])
    assert [faces is not None for faces in found] == [True, False, True, False, False]
    assert unknown == ["z", "other"], "z is the stem of two photos"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "must end in .csv or .json"),
        ("a.csv", "photo,x,y\n", "has no column eye_left_x. Its columns: photo, x, y"),
        ("a.csv", f"photo,{','.join(LANDMARKS)}\na.jpg,1,2,3,4,five,6,7,8,9,10\n", "line 2: a face must be eye_left"),
        ("a.csv", f"photo,{','.join(LANDMARKS)}\na.jpg,1,2,3,4,inf,6,7,8,9,10\n", "line 2: a face must be eye_left"),
        ("a.json", "{", "is not json"),
        ("a.json", "[1]", "must map the names of photos to faces"),
        ("a.json", '{"a.jpg": [[1, 2], [3, 4]]}', "photo 'a.jpg': a face must be"),
        ("a.json", '{"a.jpg": 5}', "photo 'a.jpg': a face must be"),
        ("a.json", '{"b.jpg": [[1, 2], [3, 4], [5, 6], [7, 8]]}', "names none of the photos.*'b.jpg'.*'a.jpg'"),
        ("a.json", "{}", "names none of the photos"),
    ],
)
def test_bad_landmark_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        LandmarkFile(tmp_path / name).match(["a.jpg"])

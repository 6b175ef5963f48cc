"""The checks of psp-doctor on files: each fault is seeded, found and named, and clean data gives no finding."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from psp_lightning.data import checks, survey
from psp_lightning.data.checks import Finding
from psp_lightning.data.labels import LabelMap, load_label_map
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.stores import FolderStore, PairLayout, ToyFacesStore

IMAGES, LABELS, SKETCHES = "CelebA-HQ-img", "CelebAMask-HQ-mask", "sketch"
KINDS = {"inversion": "rgb", "sketch2face": "sketch", "seg2face": "labels"}
LAYOUTS = {"inversion": PairLayout("inversion"), "sketch2face": PairLayout("sketch2face", "sketch"),
           "seg2face": PairLayout("seg2face", "labels")}  # fmt: skip


@pytest.fixture
def faces(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "faces"))


def check(root: Path, task: str = "inversion", target_size: int = 64, **options: object) -> list[Finding]:
    """Run the checks 1 to 10 and 12 as psp-doctor does."""
    layout = LAYOUTS[task]
    classes = load_label_map() if task == "seg2face" else None
    spec = InputSpec(KINDS[task], 64, n_classes=19 if classes else 0)
    facts = []
    findings = []
    for part in ("train", "val"):
        store = FolderStore(root, part=part, **options)  # type: ignore[arg-type]
        findings = checks.check_store(store, layout)
        facts += survey.survey(survey.pictures(store, spec, part), classes)
    return findings + checks.check_files(facts, classes, target_size)


def only(findings: list[Finding], name: str, fault: bool = True) -> Finding:
    """Return the single finding, which must be of this check."""
    assert [(item.check, item.fault) for item in findings] == [(name, fault)], [item.line() for item in findings]
    return findings[0]


def change(path: Path, edit: Callable[[Image.Image], Image.Image]) -> None:
    with Image.open(path) as image:
        edit(image.copy()).save(path)


# --- clean data


@pytest.mark.parametrize("task", LAYOUTS)
def test_clean_data_gives_no_finding(faces: Path, task: str) -> None:
    assert [item.line() for item in check(faces, task) if item.check != "classes"] == []


def test_drawn_faces_give_no_finding() -> None:
    """A store without files is checked on its first samples."""
    facts = []
    for task, layout in LAYOUTS.items():
        spec = InputSpec(KINDS[task], 64, n_classes=19)
        for part, seed in (("train", 1), ("val", 2)):
            store = ToyFacesStore(64, seed, n=1000, limit=40)
            store.prepare(layout)
            facts += survey.survey(survey.pictures(store, spec, part), load_label_map())
    assert len(facts) == 5 * 80
    assert [item.line() for item in checks.check_files(facts, None, 64)] == []


# --- 1, 2: pairs and names


def test_files_without_a_partner(faces: Path) -> None:
    (faces / SKETCHES / "3.png").unlink()
    (faces / SKETCHES / "4.png").rename(faces / SKETCHES / "four.png")
    findings = check(faces, "sketch2face")
    assert [item.check for item in findings] == ["pairs", "pairs"] and all(item.fault for item in findings)
    source, target = (item.line() for item in findings)
    assert "fault: pairs: 1 source without a target: " in source and "four.png" in source
    assert "2 targets without a source: " in target and "3.jpg" in target and "4.jpg" in target
    assert "data.unpaired=skip" in target and "22 pairs" in target
    skipped = check(faces, "sketch2face", unpaired="skip")
    assert {item.fault for item in skipped} == {False} and "left out" in skipped[0].line()


def test_a_name_that_occurs_twice(faces: Path) -> None:
    change(faces / SKETCHES / "3.png", ImageOps.flip)
    shutil.copy(faces / SKETCHES / "3.png", faces / SKETCHES / "3.bmp")
    line = only(check(faces, "sketch2face"), "names").line()
    assert "1 name of sources occurs twice" in line and "3.bmp = " in line and "3.png" in line
    Image.open(faces / IMAGES / "5.jpg").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(faces / IMAGES / "5.png")
    line = only(check(faces / IMAGES), "names", fault=False).line()
    assert "1 name with several extensions" in line and "5.jpg = " in line


def test_a_stem_in_two_subfolders_explains_why_files_do_not_pair(faces: Path) -> None:
    for name in ("a", "b"):
        (faces / SKETCHES / name).mkdir()
    (faces / SKETCHES / "3.png").rename(faces / SKETCHES / "a" / "3.png")
    (faces / SKETCHES / "4.png").rename(faces / SKETCHES / "b" / "3.png")
    findings = check(faces, "sketch2face")
    assert [item.check for item in findings] == ["pairs", "pairs", "names"]
    assert "1 stem in more than one subfolder" in findings[-1].line()


# --- 3 to 5: each picture


def test_broken_files(faces: Path) -> None:
    whole = (faces / IMAGES / "1.jpg").read_bytes()
    (faces / IMAGES / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (faces / IMAGES / "2.jpg").write_bytes(b"")
    (faces / IMAGES / "3.jpg").write_text("<html>")
    line = only(check(faces), "broken").line()
    assert "3 images cannot be read: " in line and "Replace or remove" in line
    for name, reason in (("1.jpg", "truncated"), ("2.jpg", "not an image"), ("3.jpg", "not an image")):
        assert f"{name} (" in line and reason in line


@pytest.mark.parametrize("folder", [SKETCHES, LABELS])
def test_a_broken_source(faces: Path, folder: str) -> None:
    whole = (faces / folder / "7.png").read_bytes()
    (faces / folder / "7.png").write_bytes(whole[: len(whole) // 2])
    findings = check(faces, "sketch2face" if folder == SKETCHES else "seg2face")
    assert "7.png" in only([item for item in findings if item.check != "classes"], "broken").line()


def test_another_shape_or_size(faces: Path) -> None:
    change(faces / IMAGES / "4.jpg", lambda image: image.crop((0, 0, 64, 40)))
    line = only(check(faces, target_size=0), "size").line()
    assert "1 image has another shape than the rest (64 x 64): " in line and "4.jpg (64 x 40)" in line
    shutil.copy(faces / IMAGES / "5.jpg", faces / IMAGES / "4.jpg")
    change(faces / IMAGES / "4.jpg", lambda image: ImageOps.flip(image).resize((32, 32)))
    line = only(check(faces, target_size=0), "size", fault=False).line()
    assert "1 image has another size than the rest (64 x 64): " in line and "4.jpg (32 x 32)" in line


def test_pictures_that_are_all_too_small_or_not_square(faces: Path) -> None:
    line = only(check(faces, target_size=128), "size", fault=False).line()
    assert "24 images are smaller than the 128 px of training" in line and ", and 21 more" in line
    for path in (faces / IMAGES).iterdir():
        change(path, lambda image: image.crop((0, 0, 64, 50)))
    line = only(check(faces, target_size=0), "size", fault=False).line()
    assert "24 images are not square" in line and "(64 x 50)" in line
    for i, path in enumerate(sorted((faces / IMAGES).iterdir())):
        change(path, lambda image, i=i: image.crop((0, 0, 64, 10 + 2 * (i % 20))))
    assert "24 images have many shapes" in only(check(faces, target_size=0), "size", fault=False).line()


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "grey"), ("I;16", "16-bit grey"), ("RGBA", "transparent"), ("CMYK", "CMYK")]
)
def test_other_channels(faces: Path, mode: str, name: str) -> None:
    with Image.open(faces / IMAGES / "6.jpg") as image:
        if mode == "I;16":
            odd = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            odd = image.convert(mode)
    if mode == "RGBA":
        odd.putalpha(Image.linear_gradient("L").resize(odd.size))
    (faces / IMAGES / "6.jpg").unlink()
    odd.save(faces / IMAGES / ("6.tif" if mode == "CMYK" else "6.png"))
    line = only(check(faces), "channels").line()
    assert f"1 image is {name}: " in line and "/6." in line and "The rest is colour" in line


def test_all_pictures_grey_is_a_warning(faces: Path) -> None:
    for path in (faces / IMAGES).iterdir():
        change(path, lambda image: image.convert("L"))
    assert "24 images are grey" in only(check(faces), "channels", fault=False).line()


def test_pixels_without_a_range(faces: Path) -> None:
    (faces / IMAGES / "6.jpg").unlink()
    Image.fromarray(np.random.default_rng(0).random((64, 64)).astype(np.float32)).save(faces / IMAGES / "6.tif")
    line = only(check(faces), "channels").line()
    assert "1 image cannot be used: " in line and "6.tif (floating-point pixels have no defined range)" in line


def test_photographs_instead_of_sketches(faces: Path) -> None:
    (faces / SKETCHES / "8.png").unlink()
    shutil.copy(faces / IMAGES / "8.jpg", faces / SKETCHES / "8.jpg")
    line = only(check(faces, "sketch2face"), "channels").line()
    assert "1 sketch has colours: " in line and "8.jpg" in line


# --- 6 to 8: label maps


def labels(findings: list[Finding]) -> list[Finding]:
    return [item for item in findings if item.check != "classes"]


def test_ids_and_colours_outside_the_map(faces: Path) -> None:
    def far(image: Image.Image) -> Image.Image:
        array = np.array(image)
        array[:3, :3] = 77
        return Image.fromarray(array)

    change(faces / LABELS / "9.png", far)
    line = only(labels(check(faces, "seg2face")), "ids").line()
    assert "1 label map has ids outside the label map: " in line and "9.png (id 77)" in line
    shutil.copy(faces / LABELS / "8.png", faces / LABELS / "9.png")
    change(faces / LABELS / "9.png", ImageOps.flip)
    Image.fromarray(np.full((64, 64, 3), (1, 2, 3), np.uint8)).save(faces / LABELS / "10.png")
    line = only(labels(check(faces, "seg2face")), "ids").line()
    assert "1 label map cannot be read as ids: " in line and "10.png (the colour (1, 2, 3) at row 0" in line


@pytest.mark.parametrize("quality", [75, 95])
def test_label_maps_saved_with_loss(faces: Path, quality: int) -> None:
    with Image.open(faces / LABELS / "11.png") as image:
        image.save(faces / LABELS / "11.jpg", quality=quality)
    (faces / LABELS / "11.png").unlink()
    line = only(labels(check(faces, "seg2face")), "lossy").line()
    assert "1 label map was saved with loss: " in line and "11.jpg (JPEG files" in line
    change(faces / LABELS / "11.jpg", lambda image: image)
    Image.open(faces / LABELS / "11.jpg").save(faces / LABELS / "11.png")  # JPEG's noise in a PNG
    (faces / LABELS / "11.jpg").unlink()
    found = [item for item in check(faces, "seg2face") if item.check == "lossy"]
    assert "11.png (" in only(found, "lossy").line() and "differ from all their neighbours" in found[0].line()


def test_classes_that_never_occur(faces: Path) -> None:
    for path in (faces / LABELS).iterdir():
        change(path, lambda image: Image.fromarray(np.where(np.asarray(image) == 17, 0, np.asarray(image))))
    found = next(item for item in check(faces, "seg2face") if item.check == "classes")
    assert not found.fault and found.files == ("17 neck",)
    assert "none of 22 label maps" in found.line(), found.line()


def test_a_map_without_absent_classes_gives_no_finding(faces: Path) -> None:
    own = LabelMap.from_dict({"classes": [{"id": i, "name": str(i)} for i in range(2)]})
    folder = faces / LABELS
    for i, path in enumerate(sorted(folder.iterdir())):
        change(path, lambda image, i=i: Image.fromarray((np.asarray(image) > i % 2).astype(np.uint8)))
    facts = [survey.examine(survey.Picture(str(path), "source", "labels", "train", lambda path=path: path), own)
             for path in sorted(folder.iterdir())]  # fmt: skip
    assert checks.check_classes(facts, own) == [] and checks.check_ids(facts) == []


# --- 9, 10: the same picture twice


def test_equal_pixels_under_two_names(faces: Path) -> None:
    Image.open(faces / IMAGES / "2.jpg").save(faces / IMAGES / "copy.png")  # another file with the same pixels
    findings = check(faces)
    line = only([item for item in findings if item.check != "split"], "equal", fault=False).line()
    assert "1 image under more than one name: " in line and "2.jpg = " in line and "copy.png" in line


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image,
        ImageOps.mirror,
        lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    ],
    ids=["equal", "mirrored", "smaller", "brighter"],
)
def test_a_picture_in_both_sets(drawn: Path, tmp_path: Path, edit: Callable[[Image.Image], Image.Image]) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    for path in sorted((drawn / IMAGES).iterdir()):
        folder = train if int(path.stem) < 16 else val
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.name)
    assert labels(check(train, val_root=val)) == []
    edit(Image.open(train / "3.jpg")).save(val / "other.jpg", quality=80)
    found = [item for item in check(train, val_root=val, target_size=0) if item.check != "size"]
    line = only(found, "split").line()
    assert "1 validation image in the training set" in line and "val/other.jpg = " in line and "train/3.jpg" in line


# --- 12: sketches


def test_inverted_and_grey_sketches(faces: Path) -> None:
    change(faces / SKETCHES / "5.png", ImageOps.invert)
    line = only(check(faces, "sketch2face"), "sketches").line()
    assert "1 sketch is white on black: " in line and "5.png" in line
    with Image.open(faces / IMAGES / "5.jpg") as image:
        image.convert("L").resize((64, 64)).save(faces / SKETCHES / "5.png")
    line = only(check(faces, "sketch2face"), "sketches").line()
    assert "1 sketch is grey: " in line and "5.png" in line


# --- masks, size and words


def test_masks(faces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    store = FolderStore(faces)
    store.prepare(LAYOUTS["inversion"])
    for path in store.paths():
        Image.linear_gradient("L").save(folder / f"{Path(path).stem}.png")
    Image.fromarray(np.full((8, 8), 30, np.uint8)).save(folder / "3.png")
    (folder / "4.png").write_bytes(b"x")
    masks = {path: folder / f"{Path(path).stem}.png" for path in store.paths()}
    spec = InputSpec("masked", 64)
    findings = checks.check_files(survey.survey(survey.pictures(store, spec, "train", masks)), None, 64)
    assert [item.check for item in findings] == ["broken", "channels"]
    assert "1 mask cannot be read: " in findings[0].line() and "4.png" in findings[0].line()
    assert "1 mask cannot be used: " in findings[1].line() and "its brightest pixel" in findings[1].line()


def test_memory_is_about_a_kilobyte_for_each_picture(faces: Path) -> None:
    path = next((faces / IMAGES).iterdir())
    listed = [survey.Picture(f"{i}", "image", "image", "train", lambda: path) for i in range(500)]
    tracemalloc.start()
    facts = survey.survey(listed, workers=2)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(facts) == 500 and size / 500 < 2500, f"{size / 500:.0f} bytes for each picture"


def test_a_line_names_three_files() -> None:
    assert Finding("ids", False, "2 of them", "Do this.", tuple("abcde")).line() == (
        "warning: ids: 2 of them: a, b, c, and 2 more. Do this."
    )

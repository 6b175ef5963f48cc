"""The inputs that a pattern selects, and the names of their outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data.inputs import InputDataset, collate_inputs, list_inputs
from psp_lightning.data.spec import InputSpec
from psp_lightning.lit.prediction import save_sheet
from psp_lightning.utils.errors import UserError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_names_are_unique_for_all_file_names(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.jpg.png", "b.c.png", "ü x=1.png", "d/a.png", "-f.png"):
        picture(tmp_path / name)
    names = [file.name for file in list_inputs(str(tmp_path))]
    assert len(set(names)) == 7
    assert {"b.c", "ü x=1", "d/a", "-f"} <= set(names)


def test_output_folder_inside_the_input_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "out" / "a.png")
    assert len(list_inputs(str(tmp_path), exclude=tmp_path / "out")) == 1


def test_glob_mirrors_the_tree_below_its_fixed_part(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "1" / "a.png")
    picture(tmp_path / "x" / "2" / "a.png")
    (tmp_path / "x" / "2" / "a.txt").write_text("no image")
    assert [file.name for file in list_inputs(f"{tmp_path}/x/*/*")] == ["1/a", "2/a"]


@pytest.mark.parametrize("pattern", ["nothing.png", "empty", "empty/*.png"])
def test_pattern_without_matches(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=pattern.split("/")[0]):
        list_inputs(str(tmp_path / pattern))


def test_hole_of_a_file_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    files = list_inputs(str(tmp_path))
    spec = InputSpec("masked", 16, mask={"kind": "box"})
    one, two = InputDataset(files, spec, seed=1), InputDataset(files, spec, seed=1)
    assert torch.equal(one[2]["source"], two[2]["source"])
    assert not torch.equal(one[1]["source"], one[2]["source"])


def test_missing_mask_is_reported_for_its_file(tmp_path: Path) -> None:
    files = list_inputs(str(picture(tmp_path / "a.png")))
    item = InputDataset(files, InputSpec("masked", 16), masks=picture(tmp_path / "masks" / "b.png").parent)[0]
    assert "no mask named a" in item["error"]


def test_unreadable_files_are_listed_separately(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no")
    dataset = InputDataset(list_inputs(str(tmp_path)), InputSpec("rgb", 8))
    batch = collate_inputs([dataset[0], dataset[1]])
    assert batch["index"] == [0] and batch["source"].shape == (1, 3, 8, 8)
    assert [index for index, *_ in batch["failed"]] == [1]


def test_masks_pair_by_path_if_names_repeat(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        picture(tmp_path / "in" / folder / "1.png")
    picture(tmp_path / "mask" / "b" / "1.png")
    files, spec = list_inputs(str(tmp_path / "in")), InputSpec("masked", 8)
    first, second = (InputDataset(files, spec, masks=tmp_path / "mask")[i] for i in range(2))
    assert "no mask named 1.* (if names repeat: a/1.*)" in first["error"] and "source" in second
    files = list_inputs(str(tmp_path / "in" / "*" / "1.png"))
    assert "source" in InputDataset(files, spec, masks=tmp_path / "mask")[1]
    picture(tmp_path / "mask" / "b" / "1.jpg")
    with pytest.raises(UserError, match="1 duplicate stem in .*mask"):
        InputDataset(files, spec, masks=tmp_path / "mask")


def test_stems_pair_in_other_folders(tmp_path: Path) -> None:
    file = picture(tmp_path / "in" / "a" / "1.png")
    picture(tmp_path / "mask" / "1.png")
    for pattern in (file, tmp_path / "in", f"{tmp_path}/in/**/*.png"):
        assert "source" in InputDataset(list_inputs(str(pattern)), InputSpec("masked", 8), masks=tmp_path / "mask")[0]


@pytest.mark.parametrize("pattern", ["in", "in/**/*.png", "in/**", "i*/**/a*"])
def test_links_do_not_multiply_inputs(pattern: str, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    for name in ("x", "y"):
        (tmp_path / "in" / name).symlink_to(".")
        (tmp_path / "in" / f"a{name}.png").symlink_to("a.png")
    assert [file.path.name for file in list_inputs(str(tmp_path / pattern))] == ["a.png"]


def test_sheet_names_its_inputs(tmp_path: Path) -> None:
    sheets = {}
    for name in ("a", "b", "\n\udcff" + 99 * "long ", ""):
        Image.new("RGB", (16, 16), "blue").save(tmp_path / "output.png")
        record = {"index": 0, "status": "ok", "source": f"in/{name}.png", "output": [str(tmp_path / "output.png")]}
        save_sheet(tmp_path / "sheet.png", [record], None)
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size == (128, 144)
            assert sheet.crop((0, 0, 128, 128)).getcolors() == [(128 * 128, (0, 0, 255))], "no name covers a picture"
            sheets[name] = sheet.crop((0, 128, 128, 144))
    assert all(any(pixel < 100 for pixel in line.convert("L").tobytes()) for line in list(sheets.values())[:3])
    assert sheets["a"] != sheets["b"]
    record["name"] = "b"  # an entry of a file of latents
    save_sheet(tmp_path / "sheet.png", [record], None)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.crop((0, 128, 128, 144)) == sheets["b"]


def test_sheet_shows_the_inputs_as_the_network_sees_them(tmp_path: Path) -> None:
    half = np.zeros((16, 16), np.uint8)
    half[:, 8:] = 1
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    files = {
        "grey.png": ("rgb", Image.fromarray(half.astype(np.uint16) * 65535), {}, [(0, 0, 0), (255, 255, 255)]),
        "exif.png": ("rgb", Image.fromarray(half * 255), {"exif": exif}, [(255, 255, 255), (0, 0, 0)]),
        "ids.png": ("labels", Image.fromarray(half), {}, [(0, 0, 0), (204, 0, 0)]),
        "hole.png": ("masked", Image.fromarray(half * 255), {"transparency": 0}, [(128, 128, 128), (255, 255, 255)]),
    }
    for name, (kind, image, options, colours) in files.items():
        image.save(tmp_path / name, **options)
        inputs = InputDataset(list_inputs(str(tmp_path / name)), InputSpec(kind, 16, 19 * (kind == "labels")))
        Image.new("RGB", (16, 16), "blue").save(tmp_path / "output.png")
        record = {"index": 0, "status": "ok", "source": str(tmp_path / name), "output": [str(tmp_path / "output.png")]}
        save_sheet(tmp_path / "sheet.png", [record], inputs, edge=16)
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size == (32, 18)
            assert [sheet.getpixel((x, 8)) for x in (2, 13, 20)] == [*colours, (0, 0, 255)], name
        (tmp_path / name).unlink()
        save_sheet(tmp_path / "sheet.png", [record], inputs, edge=16)  # the file has gone: white
        save_sheet(tmp_path / "sheet.png", [record], None, edge=16)

"""The inputs that a pattern selects, and the names of their outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from psp_lightning.data.inputs import InputDataset, collate_inputs, list_inputs
from psp_lightning.data.spec import InputSpec
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
    item = InputDataset(files, InputSpec("masked", 16), masks={})[0]
    assert "no mask named a" in item["error"]


def test_unreadable_files_are_listed_separately(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no")
    dataset = InputDataset(list_inputs(str(tmp_path)), InputSpec("rgb", 8))
    batch = collate_inputs([dataset[0], dataset[1]])
    assert batch["index"] == [0] and batch["source"].shape == (1, 3, 8, 8)
    assert [index for index, *_ in batch["failed"]] == [1]

"""Pairing files by stem, and messages that name unpaired files."""

import pytest
from PIL import Image

from psp_lightning.data.pairing import list_images, pair
from psp_lightning.utils.errors import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return folder


def stems(pairs):
    return [(a.name, b.name) for a, b in pairs]


def test_other_extensions_and_subfolders(tmp_path):
    source = make(tmp_path / "s", "x/1.png", "x/2.png", "10.png")
    target = make(tmp_path / "t", "1.jpg", "2.JPG", "deep/er/10.jpg")
    assert stems(pair(source, target)) == [("1.png", "1.jpg"), ("2.png", "2.JPG"), ("10.png", "10.jpg")]


def test_celebamask_names(tmp_path):
    names = [0, 1, 10, 100, 2]
    source = make(tmp_path / "CelebAMask-HQ-mask", *(f"{i}.png" for i in names))
    target = make(tmp_path / "CelebA-HQ-img", *(f"{i}.jpg" for i in reversed(names)))
    assert all(a.stem == b.stem for a, b in pair(source, target))


def test_same_stem_in_several_folders_pairs_by_path(tmp_path):
    source = make(tmp_path / "s", "a/1.png", "b/1.png")
    target = make(tmp_path / "t", "a/1.jpg", "b/1.jpg")
    assert [(a.parent.name, b.parent.name) for a, b in pair(source, target)] == [("a", "a"), ("b", "b")]


def test_missing_and_extra(tmp_path):
    source = make(tmp_path / "s", "1.png", "3.png", "4.png")
    target = make(tmp_path / "t", "1.png", "2.png")
    with pytest.raises(UserError, match=r"2 sources have no target: 3.png, 4.png.*1 targets have no source: 2.png"):
        pair(source, target)
    assert stems(pair(source, target, unpaired="skip")) == [("1.png", "1.png")]
    with pytest.raises(UserError, match="do not pair up"):
        pair(source, make(tmp_path / "u", "7.png"), unpaired="skip")
    with pytest.raises(UserError, match="unpaired='maybe'"):
        pair(source, target, unpaired="maybe")


def test_duplicates(tmp_path):
    with pytest.raises(UserError, match=r"1 duplicate stems in .*1.jpg, .*1.png"):
        pair(make(tmp_path / "s", "1.png", "1.jpg"), make(tmp_path / "t", "1.png"))


def test_invalid_folders(tmp_path):
    with pytest.raises(UserError, match="source folder .* does not exist"):
        pair(tmp_path / "none", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"contain no images \(but 1 other files\)"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        list_images(tmp_path / "notes.txt")


def test_order_and_hidden_files(tmp_path):
    make(tmp_path, "b.png", "a/z.png", "a/c.webp", ".hidden.png", ".trash/x.png", "._b.png")
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a/c.webp", "a/z.png", "b.png"]

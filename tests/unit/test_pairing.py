"""Pairing files by stem, and messages that name unpaired files."""

import pytest
from PIL import Image

from psp_lightning.data.pairing import expand, list_images, pair
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
    with pytest.raises(UserError, match=r"2 sources without a target: 3.png, 4.png.*1 target without a source: 2.png"):
        pair(source, target)
    assert stems(pair(source, target, unpaired="skip")) == [("1.png", "1.png")]
    with pytest.raises(UserError, match="do not pair up"):
        pair(source, make(tmp_path / "u", "7.png"), unpaired="skip")
    with pytest.raises(UserError, match="unpaired='maybe'"):
        pair(source, target, unpaired="maybe")


def test_duplicates(tmp_path):
    with pytest.raises(UserError, match=r"1 duplicate stem in .*1.jpg, .*1.png"):
        pair(make(tmp_path / "s", "1.png", "1.jpg"), make(tmp_path / "t", "1.png"))


def test_invalid_folders(tmp_path):
    with pytest.raises(UserError, match="source folder .* does not exist"):
        pair(tmp_path / "none", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"contain no images, but 1 other file \(1 \.txt\)"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        list_images(tmp_path / "notes.txt")


def test_order_and_hidden_files(tmp_path):
    make(tmp_path, "b.png", "a/z.png", "a/c.webp", ".hidden.png", ".trash/x.png", "._b.png")
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a/c.webp", "a/z.png", "b.png"]


# --- links


def listed(folder):
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_links_to_folders_that_contain_them_are_ignored(tmp_path):
    folder = make(tmp_path / "in", "a.png", "sub/b.png")
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to(".")
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    make(tmp_path / "out", "c.png")
    assert listed(folder) == ["a.png", "sub/b.png"]


def test_each_real_folder_and_file_is_listed_once_by_its_own_name(tmp_path):
    folder = make(tmp_path / "in", "b/1.png", "z.png")
    (folder / "a").symlink_to("b")
    (folder / "a.png").symlink_to("z.png")
    make(tmp_path / "far", "1.png", "deep/2.png")
    for name in ("f", "g"):
        (folder / name).symlink_to(tmp_path / "far")
    (folder / "h").symlink_to(tmp_path / "far" / "deep")
    assert listed(folder) == ["b/1.png", "f/1.png", "f/deep/2.png", "z.png"]


def test_broken_links_stay_listed(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("none.png")
    (tmp_path / "c.png").symlink_to("c.png")
    assert listed(tmp_path) == ["a.png", "b.png", "c.png"]


def test_links_may_share_one_target_but_no_pair_is_repeated(tmp_path):
    source, target = make(tmp_path / "s", "1.png", "2.png"), make(tmp_path / "t", "1.png")
    (target / "2.png").symlink_to("1.png")
    assert stems(pair(source, target)) == [("1.png", "1.png"), ("2.png", "2.png")]
    (source / "3.png").symlink_to("1.png")
    (target / "3.png").symlink_to("1.png")
    assert len(pair(source, target)) == 2


# --- suffixes


def test_what_pillow_reads_is_listed(tmp_path):
    make(tmp_path, "a.JFIF", "b.jpe", "c.tga", "d.pcx", "e.apng", "f.qoi", "g.jp2", "h.ico", "i.pbm", "j.gif")
    assert len(list_images(tmp_path)) == 10
    for name in ("a.eps", "b.h5", "c.mpg", "d.pdf"):
        (tmp_path / name).write_bytes(b"x")
    assert len(list_images(tmp_path)) == 10


def test_matches_left_out_are_counted(tmp_path, caplog):
    make(tmp_path, "a.png")
    for name in ("b.heic", "c.HEIC", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert len(expand(str(tmp_path / "*.png"))[1]) == 1 and not caplog.messages
    assert len(expand(str(tmp_path / "**" / "*"))[1]) == 1
    assert "3 files left out" in caplog.text and "(2 .heic, 1 .txt)" in caplog.text


def test_files_left_out_are_counted(tmp_path, caplog, monkeypatch):
    make(tmp_path, "a.png")
    list_images(tmp_path)
    assert not caplog.messages
    for name in ("a.heic", "b.HEIC", "sub/c.heic", "note.txt", "LICENSE", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        list_images(tmp_path)
    assert len(caplog.messages) == 1
    assert "5 files left out" in caplog.messages[0]
    assert "(3 .heic, 1 without a suffix, 1 .txt)" in caplog.messages[0]
    make(tmp_path, "other/a.png")
    (tmp_path / "other" / "note.md").write_text("x")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    list_images(tmp_path / "other")
    assert len(caplog.messages) == 1, "the first rank says it for all"

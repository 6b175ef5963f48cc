"""The output folder of psp-predict: any file name, outputs that cannot be written, and a folder that is used again."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_lightning.checkpoints.weight_files import save_psp
from psp_lightning.data.spec import InputSpec
from psp_lightning.loading import load_generator
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.utils import images as image_files
from psp_lightning.utils.errors import UserError

COMMON = ("progress_bar=false", "num_workers=0", "accelerator=cpu")
NAMES = [b"a.png", b"caf\xe9.png", "ünï.png".encode(), b"d/\xff\xfe.png"]


def draw(*names: bytes | str) -> None:
    for i, name in enumerate(map(os.fsdecode, names)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(name)


def predict(psp, *arguments: str, ckpt: str = "toyfaces/inversion"):
    return psp("predict", *COMMON, f"ckpt={ckpt}", *arguments)


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- names


@pytest.mark.parametrize("locale", ["utf-8", "C"])
def test_names_that_are_not_utf8(locale: str, shell, psp, here: Path) -> None:
    try:
        draw(*(b"in/" + name for name in NAMES))
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    Path("in/broken_ü.png").write_bytes(b"no picture")
    settings = ["input=in", "output=out", "latents=true", "side_by_side=true", "sheet=true"]
    if locale == "C":
        done = shell("predict", *COMMON, "ckpt=toyfaces/inversion", *settings, LC_ALL="C", PYTHONUTF8="0")
    else:
        done = predict(psp, *settings)
    assert done.code == 1 and "4 written" in done.out and "broken" in done.err and "Traceback" not in done.err, done.err
    records = {os.fsencode(record["source"]): record for record in manifest(here / "out")}
    assert set(records) == {b"in/" + name for name in NAMES} | {"in/broken_ü.png".encode()}
    assert records["in/ünï.png".encode()]["source"] == "in/ünï.png"
    for name in NAMES:
        record = records[b"in/" + name]
        assert [os.fsencode(path) for path in record["output"]] == [b"out/" + name]
        assert len(record["files"]) == 3 and all(os.path.isfile(here / "out" / file) for file in record["files"])
    again = predict(psp, "input=out/latents.safetensors", "output=again")  # the codes' names round-trip too
    assert again.code == 0, again.err
    assert {os.fsencode(path) for path in Path("again").rglob("*.png")} == {b"again/" + name for name in NAMES}
    again = predict(psp, *settings)
    assert "0 written, 4 skipped" in again.out, "another locale finds the outputs by the same names"


def test_folders_that_are_not_utf8(psp, here: Path) -> None:
    try:
        draw(b"in\xe9/a.png")
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    done = predict(psp, f"input={os.fsdecode(b'in' + bytes([0xE9]))}", f"output={os.fsdecode(b'o' + bytes([0xE9]))}")
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert os.path.isfile(b"o\xe9/a.png")


# --- outputs that cannot be written


def test_an_output_that_cannot_be_written_is_recorded(psp, here: Path) -> None:
    long = "x" * 250
    draw("in/a.png", "in/b/1.png", "in/c.png", f"in/{long}.png")
    Path("out/c.png").mkdir(parents=True)
    Path("out/b").write_text("a file where a folder is needed")
    settings = ["input=in", "output=out", "latents=true"]  # .safetensors makes the long name too long
    done = predict(psp, *settings)
    assert done.code == 1 and "1 written, 0 skipped, 3 failed" in done.out and "Traceback" not in done.err, done.err
    records = {Path(record["source"]).stem: record for record in manifest(here / "out")}
    assert [records[name]["status"] for name in ("a", "1", "c", long)] == ["ok", "error", "error", "error"]
    assert "b/1.png cannot be written: a file has the name of its folder" in records["1"]["error"]
    assert "c.png cannot be written: Is a directory" in records["c"]["error"]
    assert "File name too long" in records[long]["error"]
    assert records[long]["output"] == [f"out/{long}.png"] and Path(f"out/{long}.png").is_file(), "the image has room"
    assert not list(Path("out").rglob(".*")), "no temporary file is left"
    Path("out/b").unlink()
    Path("out/c.png").rmdir()
    done = predict(psp, *settings)
    assert "2 written, 1 skipped" in done.out and "1 failed" in done.out, "what failed is tried again"


@pytest.mark.parametrize("settings", [["output=in"], ["output=link"], ["output=in/sub/.."]])
def test_an_input_is_never_overwritten(settings: list[str], psp, here: Path) -> None:
    draw("in/0.png", "in/sub/1.png")
    Path("link").symlink_to("in")
    before = Path("in/0.png").read_bytes()
    for overwrite in ("false", "true"):
        done = predict(psp, "input=in/0.png", *settings, f"overwrite={overwrite}")
        assert done.code == 1 and "is an input and would be overwritten" in done.err, done.err
        assert Path("in/0.png").read_bytes() == before


def test_the_sheet_never_replaces_an_input(psp, here: Path) -> None:
    draw("out/sheet.png")
    before = Path("out/sheet.png").read_bytes()
    done = predict(psp, "input=out/sheet.png", "output=out", "format=jpg", "sheet=true")
    assert done.code == 1 and "sheet.png is an input and would be overwritten" in done.err, done.err
    assert Path("out/sheet.png").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resize=20000"], "resize=20000 must be a whole number, from 1 to 8192"),
        (["resize=8192", "side_by_side=true", "format=webp"], "16384 pixels wide, but format=webp allows 16383"),
        (["mix.latent_mask=[8]", "mix.n_outputs=1023", "side_by_side=true", "format=jpg"], "65536 pixels wide"),
    ],
)
def test_outputs_that_are_too_large_are_reported_first(settings: list[str], message: str, psp, here: Path) -> None:
    draw("in/0.png")
    done = predict(psp, "input=in", "output=out", *settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err
    assert not list(here.glob("out/**/0*"))


@pytest.mark.parametrize(
    ("name", "setting"),
    [("sheet.png", "sheet=true"), ("latents.safetensors", "latents=true"), ("manifest.jsonl", "seed=0")],
)
def test_a_folder_with_the_name_of_a_common_file_is_named_first(name: str, setting: str, psp, here: Path) -> None:
    draw("in/0.png")
    Path("out", name).mkdir(parents=True)
    done = predict(psp, "input=in", "output=out", setting)
    assert done.code == 1 and f"out/{name} is a folder" in done.err and "Traceback" not in done.err, done.err
    assert not list(Path("out").glob("0.png"))


def test_full_disk_stops_and_keeps_a_record_of_what_was_written(psp, here: Path, monkeypatch) -> None:
    draw("in/0.png", "in/1.png", "in/2.png")
    original, calls = Image.Image.save, itertools.count()

    def save(self, file, *args, **kwargs):
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, file, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    done = predict(psp, "input=in", "output=out", "batch_size=1")
    assert done.code == 1 and "No space left" in done.err and "Traceback" not in done.err, done.err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert [record["status"] for record in manifest(here / "out")] == ["pending"] * 3 + ["ok"]
    assert "2 written, 1 skipped" in predict(psp, "input=in", "output=out").out
    assert [record["status"] for record in manifest(here / "out")] == ["skipped", "ok", "ok"]


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_file_instead_of_a_folder_is_named(parent: str, here: Path) -> None:
    (here / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file has the name of its folder"):
        image_files.save_atomic(Image.new("RGB", (1, 1)), here / parent / "x.png")


# --- a folder that is used again


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["ckpt=toyfaces/superres"], "another checkpoint, toyfaces/inversion"),
        (["resize=16"], "resize=null, not resize=16"),
        (["mix.latent_mask=[4]", "mix.alpha=0.5"], "mix.alpha"),
        (["input=other"], "was made from in/0.png"),
    ],
)
def test_outputs_of_other_settings_are_not_skipped(changed: list[str], said: str, psp, here: Path) -> None:
    draw("in/0.png", "in/1.png", "other/0.png", "other/1.png")
    assert predict(psp, "input=in", "output=out").code == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    done = predict(psp, "input=in", "output=out", *changed)
    assert done.code == 1 and "written" not in done.out and said in done.err, done.err
    assert "2 outputs exist" in done.err and "overwrite=true" in done.err and "another folder" in done.err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before, "nothing was changed"
    assert "2 written" in predict(psp, "input=in", "output=out", *changed, "overwrite=true").out
    assert "2 skipped" in predict(psp, "input=in", "output=out", *changed).out


def test_a_checkpoint_with_the_same_name_and_other_weights(psp, here: Path) -> None:
    from psp_lightning.zoo.locate import shipped

    draw("in/0.png")
    for name in ("toyfaces/inversion", "toyfaces/superres"):
        Path("net.safetensors").write_bytes(shipped()[name].file.read_bytes())
        done = predict(psp, "input=in", "output=out", ckpt="net.safetensors")
    assert done.code == 1 and "an earlier net.safetensors" in done.err, done.err


def test_files_of_others_are_not_taken_for_outputs(psp, here: Path) -> None:
    draw("in/0.png", "out/0.png")
    done = predict(psp, "input=in", "output=out")
    assert done.code == 1 and "out/0.png has no record in manifest.jsonl" in done.err, done.err
    Path("out/manifest.jsonl").write_bytes(b'\xff\n[]\n{"source": 1}\n{"files": "0.png"}\n' + b"[" * 100_000)
    assert "no record" in predict(psp, "input=in", "output=out").err


def test_changed_inputs_are_processed_again(psp, here: Path) -> None:
    draw("in/0.png", "in/1.png")
    assert predict(psp, "input=in", "output=out", "latents=true").code == 0
    draw("in/1.png", "in/1.png")
    assert "1 written, 1 skipped" in predict(psp, "input=in", "output=out").out
    codes = ["input=out/latents.safetensors", "output=decoded"]
    assert "2 written" in predict(psp, *codes).out
    assert "2 skipped" in predict(psp, *codes).out
    assert predict(psp, "input=in", "output=out", "latents=true", "overwrite=true").code == 0
    assert "2 written" in predict(psp, *codes).out


def test_a_changed_mask_and_a_changed_reference_are_noticed(psp, here: Path) -> None:
    generator, average = load_generator("toyfaces/generator")
    shape = {"n_styles": generator.n_styles, "style_dim": generator.style_dim, "in_channels": 4, "input_size": 64}
    encoder = GradualStyleEncoder(blocks=(1, 1, 1, 1), width=8, **shape)
    save_psp("net.safetensors", PSP(encoder, generator, average, source=InputSpec("masked", 64).to_dict()))
    draw("in/0.png", "in/1.png", "mask/0.png")
    for number in (0, 1):
        Image.new("L", (40, 40), 255).save(f"mask/{number}.png")
    masked = ["input=in", "output=out", "mask.dir=mask"]
    assert "2 written" in predict(psp, *masked, ckpt="net.safetensors").out
    Image.new("L", (40, 40), 0).save("mask/1.png")
    assert "1 written, 1 skipped" in predict(psp, *masked, ckpt="net.safetensors").out
    mixed = ["input=in/0.png", "output=mixed", "mix.latent_mask=[4]", "mix.reference=in/1.png"]
    assert predict(psp, *mixed).code == 0
    assert "1 skipped" in predict(psp, *mixed).out
    draw("in/1.png")
    done = predict(psp, *mixed)
    assert done.code == 1 and "reference_sha256" in done.err and "overwrite=true" in done.err, done.err


def test_more_outputs_and_other_inputs_in_the_same_folder(psp, here: Path) -> None:
    draw("in/0.png", "more/1.png")
    assert predict(psp, "input=in", "output=out").code == 0
    assert "1 written" in predict(psp, "input=in", "output=out", "side_by_side=true").out
    assert "1 written" in predict(psp, "input=more", "output=out").out
    assert [record["source"] for record in manifest(here / "out")] == ["in/0.png", "more/1.png"]
    assert "1 skipped" in predict(psp, "input=in", "output=out", "side_by_side=true").out


def test_moved_folders_and_other_working_directories(psp, here: Path) -> None:
    draw("in/0.png")
    assert predict(psp, "input=in", "output=out").code == 0
    (here / "out").rename(here / "moved")
    done = predict(psp, f"input={here / 'in'}", "output=moved")
    assert "0 written, 1 skipped" in done.out, done.err


def test_an_input_that_fails_keeps_no_record_of_its_former_output(psp, here: Path) -> None:
    draw("in/0.png", "in/1.png")
    assert predict(psp, "input=in", "output=out").code == 0
    Path("in/0.png").write_bytes(b"damaged")
    assert "1 written" in predict(psp, "input=in", "output=out", "resize=16", "overwrite=true").out
    assert [record["status"] for record in manifest(here / "out")] == ["error", "ok"]
    done = predict(psp, "input=in", "output=out", "resize=16")
    assert done.code == 1 and "out/0.png has no record" in done.err, done.out


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_prediction_continues(overwrite: bool, psp, here: Path, monkeypatch) -> None:
    from psp_lightning.lit import prediction

    draw("in/0.png", "in/1.png", "in/2.png")
    if overwrite:  # outputs of other settings, which the interrupted call replaces
        assert predict(psp, "input=in", "output=out", "resize=16").code == 0
    original, calls = prediction.append_record, []

    def append(folder, record):
        if len(calls) == 2:
            raise UserError("stopped")
        original(folder, record)
        calls.append(record)

    monkeypatch.setattr(prediction, "append_record", append)
    done = predict(psp, "input=in", "output=out", "batch_size=1", f"overwrite={str(overwrite).lower()}")
    assert done.code == 1 and "stopped" in done.err, done.err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    done = predict(psp, "input=in", "output=out")
    assert "1 written, 2 skipped" in done.out, done.out + done.err
    sizes = {Image.open(path).size for path in Path("out").glob("*.png")}
    assert sizes == {(64, 64)}, "no output of the former settings is left"


@pytest.mark.serial
@pytest.mark.slow
def test_two_ranks_agree_on_what_exists(shell, psp, here: Path) -> None:
    draw(*(f"in/{i}.png" for i in range(4)))
    settings = [*COMMON, "ckpt=toyfaces/inversion", "input=in", "output=out", "devices=2"]
    Path("out/0.png").mkdir(parents=True)
    done = shell("predict", *settings)
    assert done.code == 1 and "3 written, 0 skipped, 1 failed" in done.out, done.err
    assert [record["status"] for record in manifest(here / "out")] == ["error", "ok", "ok", "ok"]
    Path("out/0.png").rmdir()
    Path("out/1.png").unlink()
    done = shell("predict", *settings)
    assert done.code == 0 and "2 written, 2 skipped" in done.out, done.err
    done = psp("predict", *settings, "resize=16")  # an error before the ranks start
    assert done.code == 1 and "4 outputs exist already" in done.err and "Traceback" not in done.err, done.err

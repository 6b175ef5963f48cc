"""The commands: help, errors, exit codes, outputs; a command that fails leaves no partial files."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from psp_lightning import __version__


@pytest.fixture(scope="session")
def released(golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file in the layout of the released pSp checkpoints, with drawn weights."""
    path = tmp_path_factory.mktemp("released") / "p.pt"
    torch.save(golden.psp_checkpoint(), path)
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small network as a training run saves it."""
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.psp import PSP
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=32, style_dim=32, n_mapping=2, max_channels=16)
    encoder = GradualStyleEncoder(generator.n_styles, 32, 3, 32, blocks=(1, 1, 1, 1), width=8)
    net = PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": 32})
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    torch.save({"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, path)
    return path


def images(folder: Path, n: int, size: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        array = np.random.default_rng(i).integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


def predict(psp, *arguments: str):
    return psp("predict", "progress_bar=false", "num_workers=0", "accelerator=cpu", *arguments)


# --- help and configuration


COMMANDS = ["train", "train_generator", "predict", "latents", "export", "weights", "data", "doctor", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command: str, psp) -> None:
    done = psp(command, "--help")
    lines = done.out.splitlines()
    assert done.code == 0 and f"psp-{command.replace('_', '-')} " in done.out, done.err
    assert 10 <= len(lines) <= 50 and max(map(len, lines)) <= 120
    assert psp(command, "task=inversion", "-h").out == done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_version_is_the_one_of_this_library(command: str, psp) -> None:
    done = psp(command, "--version")
    assert (done.code, done.out) == (0, f"psp-{command.replace('_', '-')} {__version__}\n"), done.err


@pytest.mark.parametrize(
    ("command", "first", "settings"),
    [
        ("predict", "ckpt=...", ["output=predictions", "precision=32-true", "mix.latent_mask=null", "seed=0"]),
        ("train", "task=inversion", ["data.root=null", "run", "trainer.max_steps=500", "loss=[l2,perceptual,id]"]),
        ("train_generator", "data.root=null", ["network=auto", "trainer.max_steps=100000", "optimizer.lr=null"]),
    ],
)
def test_help_explains_the_most_used_settings_first(command: str, first: str, settings: list[str], psp) -> None:
    lines = [line.split(maxsplit=1) for line in psp(command, "--help").out.split("\n\n")[-2].splitlines()]
    assert lines[0][0] == first and not {*settings} - {line[0] for line in lines}
    groups = ("task", "domain", "data", "generator", "loss", "encoder", "experiment", "trainer")
    for i, (setting, *comment) in enumerate(lines):
        if "=" in setting or setting in ("run", "paths.runs"):
            assert comment, f"{setting} has no comment in conf/"
            word = comment[0].split()[0].strip(":")
            assert not word.istitle() or word == "Python", f"the comment of {setting} starts with '{word}'"
        else:  # the second line of a group's options
            assert setting.endswith(",") or lines[i - 1][-1].endswith(","), setting
            assert [name for name, *_ in lines[:i] if "=" in name][-1].startswith(groups)


RARE = {"any_generator", "turned", "paste.feather", "fuse", "compile", "cuda_graphs", "progress_bar"}


def test_help_of_predict_has_every_common_setting(psp) -> None:
    from psp_lightning.cli.mistakes import flat

    settings = flat(yaml.safe_load(psp("predict", "--cfg", "job").out))
    shown = psp("predict", "--help").out
    hidden = {key for key in settings if f"\n{key}=" not in shown}
    assert {key for key in hidden if not key.startswith(("loss.", "refine.", "embed"))} == RARE


def test_cfg_job_answers_quickly_and_without_torch(shell) -> None:
    code = (
        "import sys; sys.argv=['psp-train', '--cfg', 'job']; from psp_lightning.cli.train import main; main();"
        "assert 'torch' not in sys.modules, 'composing a configuration must not import torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "task:" in done.stdout and "resume: null" in done.stdout


def test_import_has_no_side_effects() -> None:
    code = (
        "import sys, psp_lightning; assert 'torch' not in sys.modules; "
        "import torch; state = torch.get_rng_state(); import psp_lightning.build.training; "
        "assert torch.equal(state, torch.get_rng_state())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=inversoin"], "Did you mean 'inversion'?"),
        (["domain=toyface"], "Did you mean 'toyfaces'?"),
        (["loss=[l2,lpisp]"], "Did you mean 'lpips'?"),
        (["loss.lpips.weight=0.4"], "not selected"),
        (["+loss.lpips.weight=0.4"], "not selected"),
        (["optimizer.lrr=1"], "Did you mean 'optimizer.lr'?"),
        (["domain=ffhq", "data.root=.", "model.backbone=null", "loss=l2"], "generator.path"),
        (["data=folder", "data.root=nowhere"], "nowhere"),
        (["task=sketch2face", "data=folder", "data.root=."], "data.source"),
        (["trainer.devices=many"], "many"),
        (["resume=nowhere"], "nowhere"),
        (["init_from=nowhere.pt"], "nowhere.pt"),
        (["model.batch_norm=synk"], "Did you mean 'sync'?"),
        (["plugins=[no_such_module]"], "no_such_module"),
        (["loss=[l2,id]", "domain.identity=ir_se50"], "ir_se50"),
    ],
)
def test_bad_settings_are_named(arguments: list[str], message: str, psp, tiny: list[str], tmp_path: Path) -> None:
    if any("data.root" in item or item == "data=folder" for item in arguments):
        tiny = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    done = psp("train", *tiny, *arguments)
    assert done.code == 1
    assert message in done.err and done.err.startswith("error: "), done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.rglob("*.ckpt"))


# --- prediction


@pytest.mark.parametrize("encoder", ["GradualStyleEncoder", "BackboneEncoderUsingLastLayerIntoW"])
def test_released_checkpoint_predicts_photos(encoder: str, golden, psp, photos: Path, tmp_path: Path) -> None:
    from psp_lightning import PSP

    torch.save(golden.psp_checkpoint(encoder), tmp_path / "p.pt")
    done = predict(psp, "ckpt=p.pt", f"input={photos}", "output=out")
    assert done.code == 0, done.err
    written = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert written == {path.stem for path in photos.iterdir()}
    net = PSP.from_checkpoint(tmp_path / "p.pt")
    assert not net.training and net.source["kind"] == "rgb"
    from psp_lightning.data.transforms import rgb

    with torch.no_grad():
        expected = net(rgb(photos / "face_0.jpg", 256)[None])[0]
    found = np.asarray(Image.open(tmp_path / "out" / "face_0.png"), dtype=np.float32)
    wanted = (expected.clamp(-1, 1) * 127.5 + 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - wanted).max() <= 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_input_gives_one_output(n: int, psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", n)
    done = predict(psp, f"ckpt={small}", "input=in", "output=out", "batch_size=3")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "out").glob("*.png"))) == n
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == n


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_two_ranks_write_every_output_once(n: int, shell, psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", n)
    done = shell("predict", f"ckpt={small}", "input=in", "output=out", "batch_size=3", "accelerator=cpu", "devices=2")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [Path(line["source"]).stem for line in lines] == [str(i) for i in range(n)]
    assert predict(psp, f"ckpt={small}", "input=in", "output=one").code == 0
    for i in range(n):
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / f / f"{i}.png")) for f in ("out", "one")))


def test_tree_is_mirrored_and_equal_stems_get_different_outputs(psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in" / "a" / "b", 1)
    images(tmp_path / "in", 1)
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "0.jpg")
    assert predict(psp, f"ckpt={small}", "input=in", "output=out").code == 0
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"0.png.png", "0.jpg.png", "a/b/0.png"}
    assert predict(psp, f"ckpt={small}", "input=in/**/0.png", "output=glob").code == 0
    found = {path.relative_to(tmp_path / "glob").as_posix() for path in (tmp_path / "glob").rglob("*.png")}
    assert found == {"0.png", "a/b/0.png"}


def test_unreadable_image_is_reported_and_the_rest_is_predicted(psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 3)
    (tmp_path / "in" / "1.png").write_bytes(b"not a picture")
    done = predict(psp, f"ckpt={small}", "input=in", "output=out")
    assert done.code == 1
    assert "1.png" in done.err and "Traceback" not in done.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "error", "ok"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "2.png"]


def test_existing_outputs_are_skipped(psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 2)
    assert predict(psp, f"ckpt={small}", "input=in", "output=out").code == 0
    (tmp_path / "out" / "1.png").unlink()
    mark = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    done = predict(psp, f"ckpt={small}", "input=in", "output=out", "sheet=true")
    assert "1 written, 1 skipped (overwrite=true" in done.out
    sheet = (tmp_path / "out" / "sheet.png").read_bytes()
    (tmp_path / "out" / "sheet.png").unlink()
    assert "0 written, 2 skipped" in predict(psp, f"ckpt={small}", "input=in", "output=out", "sheet=true").out
    assert (tmp_path / "out" / "sheet.png").read_bytes() == sheet, "it does not depend on what was computed now"
    assert (tmp_path / "out" / "0.png").stat().st_mtime_ns == mark
    (tmp_path / "out" / "0.png").unlink()
    assert "1 written, 1 skipped" in predict(psp, f"ckpt={small}", "input=in", "output=out", "sheet=true").out
    assert (tmp_path / "out" / "sheet.png").read_bytes() == sheet, "it is in the order of the inputs"
    done = predict(psp, f"ckpt={small}", "input=in", "output=out", "overwrite=true")
    assert "2 written, 0 skipped" in done.out


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_formats_extras_and_size(suffix: str, psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 2)
    done = predict(
        psp, f"ckpt={small}", "input=in", "output=out", f"format={suffix}", "resize=16", "side_by_side=true",
        "latents=true", "sheet=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert Image.open(out / f"0.{suffix}").size == (16, 16)
    assert Image.open(out / "side_by_side" / f"0.{suffix}").size == (32, 16)
    with safe_open(out / "latents" / "1.safetensors", "np") as file:
        second = file.get_tensor("w_plus")
    with safe_open(out / "latents.safetensors", "np") as whole:
        assert second.shape == (1, 8, 32) and np.array_equal(whole.get_tensor("w_plus")[1:], second)
    assert (out / "sheet.png").exists()


def test_style_mixing(psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 2)
    common = [f"ckpt={small}", "input=in"]
    mask = "mix.latent_mask=[4,5,6,7]"
    assert predict(psp, *common, "output=plain").code == 0
    done = predict(psp, *common, "output=a", mask, "mix.n_outputs=2")
    assert done.code == 0, done.err
    assert predict(psp, *common, "output=b", mask, "mix.n_outputs=2", "batch_size=1").code == 0
    assert predict(psp, *common, "output=zero", mask, "mix.alpha=0").code == 0
    assert predict(psp, *common, "output=ref", mask, "mix.reference=in/1.png").code == 0

    def read(name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / name), dtype=np.int16)

    assert np.array_equal(read("a/0_0.png"), read("b/0_0.png")), "the batch size must not change the drawn styles"
    assert not np.array_equal(read("a/0_0.png"), read("a/0_1.png"))
    assert np.array_equal(read("zero/0.png"), read("plain/0.png"))
    assert np.array_equal(read("ref/1.png"), read("plain/1.png")), "mixing an image with itself must change nothing"
    assert not np.array_equal(read("ref/0.png"), read("plain/0.png"))
    for bad, message in (("mix.n_outputs=2", "latent_mask"), ("mix.latent_mask=[8]", "no style 8")):
        done = predict(psp, *common, "output=bad", bad)
        assert done.code == 1 and message in done.err


class Attack:
    """An object that creates the file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["truncated", "text", "html", "attack", "missing", "empty folder"])
def test_bad_checkpoints_are_rejected(kind: str, psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 1)
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes(small.read_bytes()[:20000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    elif kind == "attack":
        torch.save({"state_dict": Attack(tmp_path / "owned")}, path, pickle_module=pickle)
    elif kind == "empty folder":
        path.mkdir()
    done = predict(psp, f"ckpt={path}", "input=in", "output=out")
    assert done.code == 1 and "bad.pt" in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "owned").exists(), "code of the checkpoint ran"
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=nowhere"], "nowhere"),
        (["input=empty"], "empty"),
        (["input=in", "format=gif"], "gif"),
        (["input=in", "factor=4"], "factor"),
        (["input=in", "output=in/0.png"], "in/0.png"),
    ],
)
def test_bad_prediction_settings(arguments: list[str], message: str, psp, small: Path, tmp_path: Path) -> None:
    images(tmp_path / "in", 1)
    (tmp_path / "empty").mkdir()
    done = predict(psp, f"ckpt={small}", "output=out", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err


def test_missing_arguments_are_named(psp) -> None:
    done = predict(psp)
    assert done.code == 1 and "ckpt" in done.err and "input" in done.err


def test_full_disk_leaves_no_partial_files(psp, small: Path, tmp_path: Path, monkeypatch) -> None:
    images(tmp_path / "in", 2)
    original = Image.Image.save

    def save(self, file, *args, **kwargs):
        original(self, file, *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    done = predict(psp, f"ckpt={small}", "input=in", "output=out")
    assert done.code == 1 and "No space left" in done.err and "Traceback" not in done.err, done.err
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["manifest.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["pending", "pending"]


# --- stopping


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_resumable_state(number: int, shell, tiny: list[str], tmp_path: Path) -> None:
    tiny = [item for item in tiny if "steps" not in item and "val_every" not in item]
    tiny += ["callbacks.images.every_n_steps=2", "trainer.max_steps=100000", "run=r"]
    command = [sys.executable, "-m", "psp_lightning.cli.train", *tiny]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "runs" / "inversion" / "r"
    try:
        deadline = time.time() + 120
        while not (run / "images" / "train_00000002.png").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "resume=" in out and "Traceback" not in out, out
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    done = shell("train", f"resume={run}", f"trainer.max_steps={step + 1}")
    assert done.code == 0, done.err
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step + 1


def test_nan_is_named(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", *tiny, "optimizer.lr=1e30", "trainer.max_steps=50", "trainer.val_every=50")
    assert done.code == 1
    assert "loss term 'l2'" in done.err and "toyfaces/" in done.err and "Traceback" not in done.err, done.err

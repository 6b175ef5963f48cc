"""psp-doctor data: exit status, lines, files and figures; the faults that need networks; what psp-train says."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from psp_lightning.data.checks import CHECKS

IMAGES, LABELS, SKETCHES = "CelebA-HQ-img", "CelebAMask-HQ-mask", "sketch"
FILES_ONLY = ["doctor.images=0", "doctor.trial=false", "doctor.faces=0"]
QUICK = ["trainer=cpu", "data.batch_size=2", "doctor.progress_bar=false", "data.num_workers=0"]
CLASSES = "classes:\n" + "".join(f"- {{id: {i}, name: class {i}}}\n" for i in range(2))


@pytest.fixture
def faces(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "faces"))


@pytest.fixture
def doctor(psp, faces: Path):
    """Run psp-doctor data on the drawn faces."""

    def call(task: str, *settings: str):
        return psp("doctor", "data", f"task={task}", "data=folder", "data.root=faces", *QUICK, *settings)

    return call


def told(done) -> list[str]:
    """Return the lines about faults and warnings."""
    return [line for line in done.out.splitlines() if line.startswith(("fault: ", "warning: "))]


def two_classes(folder: Path) -> None:
    """Replace the label maps with maps of two classes, and write their label map."""
    for path in folder.iterdir():
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8)).save(path)
    (folder.parent.parent / "classes.yaml").write_text(CLASSES)


# --- clean data


@pytest.mark.parametrize("task", ["inversion", "sketch2face", "seg2face", "inpainting", "superres"])
def test_clean_data(doctor, faces: Path, task: str, tmp_path: Path) -> None:
    settings = ["doctor.images=2", "doctor.steps=120", "doctor.faces=12"]
    if task != "inversion":
        settings = ["doctor.minutes=0", *settings]  # one task draws
    if task == "seg2face":
        two_classes(faces / LABELS)
        settings.append("task.datamodule.label_map=classes.yaml")
    done = doctor(task, *settings)
    assert (done.code, told(done)) == (0, []), done.out + done.err
    assert done.out.splitlines()[-1] == "0 faults, 0 warnings; doctor/findings.json"
    figures = json.loads((tmp_path / "doctor" / "findings.json").read_text())
    assert figures["findings"] == [] and figures["seconds_per_step"] > 0
    assert figures["memory_mb"] > 100 and figures["steps"] == 500
    for words in ("s for a step on cpu, about ", " GB of the process at data.batch_size=2"):
        assert words in done.out, done.out
    names = ["pairs.png"]
    if task == "inversion":
        assert "at best 2" in done.out and len(figures["psnr_floor"]) == 2
        names.append("generator.png")
    assert [Image.open(tmp_path / "doctor" / name).size for name in names] == [(256, 16 + 2 * 144)] * len(names)
    if task == "seg2face":
        rows = [line.split() for line in done.out.splitlines() if " class " in line]
        assert [row[:3] for row in rows] == [["0", "class", "0"], ["1", "class", "1"]]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*.log")), "the doctor writes no run"


def test_drawn_data(psp) -> None:
    done = psp("doctor", "data", *QUICK, "doctor.minutes=0", "doctor.faces=8", "data.limit=40")
    assert (done.code, told(done)) == (0, []), done.out + done.err


# --- each fault is found and named


def move(folder: Path) -> None:
    (folder / SKETCHES / "1.png").rename(folder / SKETCHES / "one.png")


def double(folder: Path) -> None:
    Image.open(folder / SKETCHES / "1.png").save(folder / SKETCHES / "1.bmp")


def truncate(folder: Path) -> None:
    path = folder / IMAGES / "1.jpg"
    path.write_bytes(path.read_bytes()[:700])


def crop(folder: Path) -> None:
    Image.open(folder / IMAGES / "1.jpg").crop((0, 0, 64, 40)).save(folder / IMAGES / "1.jpg")


def grey(folder: Path) -> None:
    Image.open(folder / IMAGES / "1.jpg").convert("L").save(folder / IMAGES / "1.jpg")


def unknown_id(folder: Path) -> None:
    Image.new("L", (64, 64), 99).save(folder / LABELS / "1.png")


def jpeg(folder: Path) -> None:
    Image.open(folder / LABELS / "1.png").save(folder / LABELS / "1.jpg")
    (folder / LABELS / "1.png").unlink()


def no_class(folder: Path) -> None:
    for path in (folder / LABELS).iterdir():
        Image.new("L", (64, 64), int(path.stem)).resize((64, 64)).save(path) if int(path.stem) < 18 else path.unlink()
    for path in (folder / IMAGES).iterdir():
        if int(path.stem) >= 18:
            path.unlink()


def copy(folder: Path) -> None:
    Image.open(folder / IMAGES / "1.jpg").save(folder / IMAGES / "other.png")


def leak(folder: Path) -> None:
    (folder / "val").mkdir()
    Image.open(folder / IMAGES / "1.jpg").resize((60, 60)).save(folder / "val" / "new.jpg")


def upside_down(folder: Path) -> None:
    for path in (folder / IMAGES).iterdir():
        ImageOps.flip(Image.open(path)).save(path)


def shift(folder: Path) -> None:
    for path in (folder / IMAGES).iterdir():
        image = Image.open(path).resize((256, 256))
        image.transform((256, 256), Image.Transform.AFFINE, (0.75, 0, 64, 0, 0.75, 30)).save(path)


def invert(folder: Path) -> None:
    ImageOps.invert(Image.open(folder / SKETCHES / "1.png")).save(folder / SKETCHES / "1.png")


def noise(folder: Path) -> None:
    for path in (folder / IMAGES).iterdir():
        pixels = np.random.default_rng(int(path.stem)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path)


def wrong_average(folder: Path) -> None:
    from psp_lightning.checkpoints.weight_files import save_generator
    from psp_lightning.loading import load_generator

    generator, average = load_generator("toyfaces/generator")
    assert average is not None
    save_generator(folder / "g.safetensors", generator, latent_avg=(average + 1, "a test"))


def wrong_range(folder: Path) -> None:
    from psp_lightning.checkpoints.weight_files import save_generator
    from psp_lightning.loading import load_generator

    generator, average = load_generator("toyfaces/generator")
    with torch.no_grad():
        for layer in (generator.to_rgb1, *generator.to_rgbs):
            layer.conv.weight *= 0.5
            layer.bias *= 0.5
        generator.to_rgbs[-1].bias += 0.5
    save_generator(folder / "g.safetensors", generator, latent_avg=(average, "a test"))


OWN = ["generator=file", "generator.path=faces/g.safetensors", "doctor.images=2", "doctor.steps=1"]
SEEDED = [
    ("pairs", "sketch2face", move, ["sketch/one.png"], [], True),
    ("names", "sketch2face", double, ["sketch/1.bmp = "], [], True),
    ("broken", "inversion", truncate, ["1.jpg (image file is truncated"], [], True),
    ("size", "inversion", crop, ["1.jpg (64 x 40)"], [], True),
    ("channels", "inversion", grey, ["1.jpg"], [], True),
    ("ids", "seg2face", unknown_id, ["1.png (id 99)"], [], True),
    ("lossy", "seg2face", jpeg, ["1.jpg (JPEG"], [], True),
    ("classes", "seg2face", no_class, ["18 cloth"], ["data.val_share=0.05"], False),
    ("equal", "inversion", copy, ["1.jpg = ", "other.png"], [], False),
    ("split", "inversion", leak, ["val/new.jpg = ", "1.jpg"], ["data.val_root=faces/val"], True),
    ("faces", "inversion", upside_down, ["a face is found in "], ["doctor.faces=12"], True),
    ("faces", "inversion", shift, ["from their place in FFHQ"], ["doctor.faces=12"], True),
    ("sketches", "sketch2face", invert, ["sketch/1.png"], [], True),
    ("generator", "inversion", noise, ["cannot draw your data", " dB PSNR"], ["doctor.images=2"], True),
    ("average", "inversion", wrong_average, ["standard deviations from the mean"], OWN, True),
    ("average", "inversion", wrong_range, ["images range from "], OWN, True),
]


@pytest.mark.parametrize(
    ("check", "task", "spoil", "words", "settings", "fault"),
    SEEDED,
    ids=[f"{row[0]}-{row[2].__name__}" for row in SEEDED],  # type: ignore[attr-defined]
)
def test_each_fault_is_found_and_named(
    doctor, faces: Path, check: str, task: str, spoil: Callable[[Path], None], words: list[str], settings: list[str],
    fault: bool,
) -> None:  # fmt: skip
    spoil(faces)
    done = doctor(task, *FILES_ONLY, *settings)
    kind = "fault" if fault else "warning"
    line = next((line for line in told(done) if line.startswith(f"{kind}: {check}: ")), "")
    assert line and all(word in line for word in words), done.out + done.err
    faults = sum(line.startswith("fault") for line in told(done))
    assert done.code == (faults > 0) and (not fault or faults), done.out
    assert f"{faults} fault" in done.out.splitlines()[-1]


def test_every_check_is_seeded() -> None:
    assert {row[0] for row in SEEDED} == set(CHECKS)


# --- messages


def test_all_files_are_in_the_record_and_three_in_the_line(doctor, faces: Path, tmp_path: Path) -> None:
    for i in range(7):
        (faces / IMAGES / f"{i}.jpg").write_bytes(b"x")
    done = doctor("inversion", *FILES_ONLY)
    assert done.code == 1 and "7 images cannot be read: " in done.out and ", and 4 more. " in done.out
    (finding,) = json.loads((tmp_path / "doctor" / "findings.json").read_text())["findings"]
    assert finding["check"] == "broken" and finding["fault"] and len(finding["files"]) == 7


def test_broken_files_do_not_hide_other_checks(doctor, faces: Path) -> None:
    truncate(faces)
    invert(faces)
    done = doctor("sketch2face", "doctor.faces=2")
    assert [line.split(": ")[1] for line in told(done)] == ["broken", "sketches"], done.out + done.err
    assert "not checked until the files above are fixed" in done.out


def test_without_the_face_detector_a_line_has_its_command(doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **options):
        if name == "facenet_pytorch":
            raise ImportError("No module named 'facenet_pytorch'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = doctor("inversion", "doctor.images=0", "doctor.trial=false")
    assert done.code == 0 and "pip install --no-deps facenet-pytorch==2.6.0" in done.out, done.out + done.err


def test_a_training_that_cannot_start_is_a_fault(doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "none"))
    done = doctor("inversion", "doctor.images=0", "doctor.faces=0", "loss=[l2,lpips]")
    assert done.code == 1 and "fault: training: the training does not start" in done.out
    assert "psp-weights get alexnet" in done.out


def test_a_long_projection_is_skipped(doctor) -> None:
    done = doctor("inversion", "doctor.faces=0", "doctor.trial=false", "doctor.minutes=0")
    assert done.code == 0 and "not drawn: this takes about" in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.root=nowhere"], "nowhere does not exist"),
        (["doctor.steps=0"], "doctor.steps=0 must be a whole number"),
        (["doctor.imagse=1"], "Did you mean 'doctor.images'"),
        (["task=sketchface"], "Did you mean 'sketch2face'"),
        (["-m"], "leave out -m"),
    ],
)
def test_mistakes(doctor, settings: list[str], words: str) -> None:
    done = doctor("inversion", *settings)
    assert done.code == 1 and words in done.err and "Traceback" not in done.err, done.err


def test_help_of_data(psp) -> None:
    done = psp("doctor", "data", "--help")
    assert done.code == 0 and "psp-doctor data task=sketch2face" in done.out and "doctor.images=4" in done.out
    assert psp("doctor", "data", "--cfg", "job").code == 0


# --- psp-doctor without arguments


def test_what_is_installed(psp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from psp_lightning.cli import installed

    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_ir_se50.pth").write_bytes(b"x")
    real = installed._version
    monkeypatch.setattr(installed, "_version", lambda name: None if name in ("onnx", "facenet-pytorch") else real(name))
    done = psp("doctor")
    rows = {line[:21].strip(): line[22:] for line in done.out.splitlines()}
    assert done.code == 0 and rows["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert rows["facenet-pytorch"].endswith("pip install --no-deps facenet-pytorch==2.6.0")
    assert rows["onnx"].endswith("pip install 'psp-lightning[export]'") and rows["onnx"].startswith("missing")
    assert rows["ir_se50"].startswith("there") and rows["alexnet"].endswith("psp-weights get alexnet")
    monkeypatch.setattr(installed, "_version", lambda name: None if name == "lpips" else real(name))
    done = psp("doctor")
    assert done.code == 1 and "MISSING: pip install psp-lightning" in done.out


def test_every_extra_is_among_the_optional_parts() -> None:
    import re

    from psp_lightning.cli.installed import OPTIONAL, REQUIRED

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    named = {name for name, _, _ in OPTIONAL}
    for extra in ("tensorboard", "download", "export", "demo", "sweep", "slurm", "joblib"):
        packages = re.findall(r'"([\w-]+)>=', re.search(rf"^{extra} = (.*)$", project, re.MULTILINE)[1])  # type: ignore[index]
        assert packages and set(packages) <= named, extra
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert re.search(r"FACENET := (\S+)", makefile)[1] in OPTIONAL[0][2]  # type: ignore[index]
    assert all(f'"{name}' in project for name in REQUIRED)


# --- psp-train


def test_training_says_what_is_wrong_with_its_first_batch(psp, faces: Path, tiny: list[str]) -> None:
    kept = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    settings = ["data=folder", "data.root=faces/CelebA-HQ-img", "data.num_workers=0", "data.batch_size=24", *kept]
    settings = [item for item in settings if item != "data.batch_size=2"]
    done = psp("train", *settings, "run=clean")
    assert done.code == 0 and "warning: " not in done.err + done.out and "fault: " not in done.err + done.out, done.err
    crop(faces)
    done = psp("train", *settings, "data.val_share=0", "run=spoiled")
    assert done.code == 0 and "fault: size: 1 image has another shape" in done.err + done.out, done.err


def test_training_says_how_many_files_are_left_out(psp, faces: Path, tiny: list[str]) -> None:
    move(faces)
    kept = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    settings = ["task=sketch2face", "data=folder", "data.root=faces", "data.unpaired=skip", "data.num_workers=0"]
    done = psp("train", *settings, *kept)
    text = done.err + done.out
    assert done.code == 0 and "warning: pairs: 1 source without a target" in text, text


# --- debug=overfit10


def test_overfit10_ends_with_an_error_if_the_loss_does_not_fall(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", "debug=overfit10", "run=no", *tiny, "optimizer.lr=1e-9", "trainer.max_steps=4")
    assert done.code == 1 and "the loss went from" in done.err and "a factor of " in done.err, done.err
    assert "must fall by 2 or more" in done.err and "Traceback" not in done.err
    assert (tmp_path / "runs/inversion/no/checkpoints/last.ckpt").is_file()
    done = psp("train", "debug=overfit10", "run=ok", *tiny, "callbacks.overfit.factor=1", "trainer.max_steps=4",
               "optimizer=adam", "optimizer.lr=1e-3", "callbacks.overfit.window=1", "data.limit=2")  # fmt: skip
    assert done.code == 0 and "it can learn these images" in done.err + done.out, done.err

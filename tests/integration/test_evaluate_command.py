"""psp-evaluate as a user calls it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from psp_lightning.checkpoints.read import resolve
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.utils.images import to_pil

QUIET = ["progress_bar=false", "accelerator=cpu"]
FAST = [*QUIET, "data.limit=2", "timing=1", "images=1"]

KILL = """
import os, signal

from psp_lightning.lit import results
from psp_lightning.metrics import MSE

WHEN = os.environ.get("KILL", "")


class Watched(MSE):
    def per_image(self, y_hat, y):
        self.seen = getattr(self, "seen", 0) + 1
        if WHEN in ("measuring", "terminated") and self.seen == 2:
            os.kill(os.getpid(), signal.SIGKILL if WHEN == "measuring" else signal.SIGTERM)
        return super().per_image(y_hat, y)


replace = os.replace


def kill_instead(*names):
    if str(names[1]).endswith("metrics.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)


if WHEN == "writing":
    os.replace = kill_instead
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Write three drawn faces, and three others as outputs, and return the settings."""
    faces = ToyFaces(64, seed=3, n=6)
    for index in range(6):
        folder = tmp_path / ("outputs" if index < 3 else "targets")
        folder.mkdir(exist_ok=True)
        to_pil(faces[index]["image"]).save(folder / f"{index % 3}.png")
    return ["outputs=outputs", "targets=targets"]


def load(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_network_on_drawn_faces(psp, tmp_path: Path) -> None:
    done = psp("evaluate", "ckpt=toyfaces/inversion", "metric=[psnr,mse,id_similarity,miou,frechet]", *FAST)
    assert done.code == 0, done.err
    record, table = load(tmp_path / "evaluation"), rows(tmp_path / "evaluation")
    assert record["format"] == 1 and record["name"] == record["checkpoint"] == "toyfaces/inversion"
    assert (record["task"], record["as"], record["n_images"]) == ("inversion", "uint8", 2)
    assert len(record["checkpoint_sha256"]) == len(record["files_sha256"]) == 64
    assert record["seconds_per_image"] > 0 and record["peak_memory_mib"] > 100
    assert {"psp_lightning", "torch", "torchmetrics"} <= record["versions"].keys()
    psnr = record["metrics"]["psnr"]
    assert psnr["better"] == "higher" and psnr["unit"] == "dB" and psnr["low"] <= psnr["mean"] <= psnr["high"]
    assert list(table[0]) == ["index", "name", "psnr", "mse", "id_similarity", "miou"], "Frechet has no value per image"
    assert sum(float(row["psnr"]) for row in table) / 2 == pytest.approx(psnr["mean"], rel=1e-12)
    assert record["metrics"]["frechet"]["mean"] > 0 and record["metrics"]["frechet"]["low"] is None
    assert all(row["error"] is None and row["convention"] for row in record["metrics"].values())
    shown = record["images"]["shown"]
    best = max(table, key=lambda row: float(row["psnr"]))
    assert [entry["which"] for entry in shown] == ["best", "worst"] and shown[0]["name"] == best["name"]
    for entry in shown:
        for kind in ("source", "target", "output"):
            assert Image.open(tmp_path / "evaluation" / entry[kind]).size == (64, 64)
    assert "| toyfaces/inversion | 2 |" in done.out


def test_finished_images_and_two_ranks(psp, folders: list[str], tmp_path: Path) -> None:
    metrics = "metric=[mse,ssim,perceptual]"
    for name, more in (("one", ["batch_size=1"]), ("two", ["batch_size=1", "devices=2"])):
        done = psp("evaluate", *folders, metrics, f"output={name}", *more, *QUIET)
        assert done.code == 0, done.err
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one["task"] == "pairs" and one["checkpoint"] is None and one["seconds_per_image"] is None
    assert [row["name"] for row in rows(tmp_path / "one")] == ["0.png", "1.png", "2.png"]
    for name, row in one["metrics"].items():
        for key in ("mean", "low", "high", "median"):
            assert two["metrics"][name][key] == pytest.approx(row[key], rel=1e-9), name
    assert one["images"] == two["images"] and one["files_sha256"] == two["files_sha256"]
    assert one["images"]["shown"][0]["source"] is None


def test_a_sweep_ends_in_one_table(psp, tmp_path: Path) -> None:
    jobs = ["ckpt=identity,toyfaces/superres", "task=superres", "factor=4", "metric=[mse,consistency]", "output=all"]
    done = psp("evaluate", "-m", *jobs, *FAST)
    assert done.code == 0, done.err
    lines = (tmp_path / "all" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["name", "---", "identity", "toyfaces/superres"]
    assert lines[2] in done.out
    with (tmp_path / "all" / "table.csv").open(newline="") as file:
        identity, network = csv.DictReader(file)
    for name, row in (("identity", identity), ("toyfaces_superres", network)):
        record = load(tmp_path / "all" / name)
        assert record["task"] == "superres" and record["settings"]["factor"] == 4
        assert float(row["mse_mean"]) == record["metrics"]["mse"]["mean"]
    assert load(tmp_path / "all" / "identity")["checkpoint"] is None


def test_jobs_of_a_sweep_can_be_told_apart(psp, folders: list[str], tmp_path: Path) -> None:
    cheap = [folders[1], "metric=[mse]", "images=0", *QUIET]
    done = psp("evaluate", "-m", "outputs=outputs,nothing", *cheap, "size=16,32", "output=all")
    assert done.code == 1 and "outputs=nothing is not a folder" in done.err
    lines = (tmp_path / "all" / "table.md").read_text().splitlines()[2:]
    names = [f"{name}, size={size}" for name in ("outputs", "nothing") for size in (16, 32)]
    assert [line.split("|")[1].strip() for line in lines] == names
    assert load(tmp_path / "all" / "outputs_size_16")["settings"]["size"] == 16
    assert psp("evaluate", "-m", folders[0], *cheap, "name=..,b", "output=all").code == 0
    assert not (tmp_path / "metrics.json").exists(), "a name is not a path"


def test_a_job_that_fails_has_a_row_with_the_reason(psp, folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "all" / "nothing").mkdir(parents=True)
    (tmp_path / "all" / "nothing" / "metrics.json").write_text("of an earlier evaluation")
    sweep = ["-m", folders[1], "metric=[mse]", "images=0", "output=all", *QUIET]
    done = psp("evaluate", *sweep, "outputs=nothing,outputs")
    assert done.code == 1 and "Traceback" not in done.err, done.err
    reason = "outputs=nothing is not a folder"
    head, _, bad, good = (tmp_path / "all" / "table.md").read_text().splitlines()
    assert head.endswith("| error |") and bad.startswith("| nothing |  |") and reason in bad
    assert good.startswith("| outputs | 3 |") and good.endswith("|  |") and bad in done.out
    with (tmp_path / "all" / "table.csv").open(newline="") as file:
        bad_row, good_row = csv.DictReader(file)
    assert reason in bad_row["error"] and bad_row["mse_mean"] == bad_row["n_images"] == good_row["error"] == ""
    page = (tmp_path / "all" / "report.html").read_text()
    assert reason in page and "<h1>2 evaluations</h1>" in page and "earlier evaluation" not in page
    done = psp("evaluate", *sweep, "outputs=nothing,none")
    assert done.code == 1 and "| none |" in done.out and not (tmp_path / "all" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.serial
def test_two_ranks_with_a_network_in_the_loop(shell, tmp_path: Path) -> None:
    """The last of the five batches has 5 images, and so one rank has three batches and the other two."""
    settings = ["ckpt=toyfaces/inversion", "data.limit=37", "batch_size=8", "as=float", "images=0", "timing=0", *QUIET]
    threads = str(max(1, (os.cpu_count() or 1) // 2))  # as many as each of two ranks uses
    for devices in (1, 2):
        more = ["metric=[mse,id_similarity,frechet]", f"devices={devices}", f"output={devices}"]
        done = shell("evaluate", *settings, *more, OMP_NUM_THREADS=threads)
        assert done.code == 0, done.err
    one, two = (load(tmp_path / name) for name in "12")
    assert one["settings"]["threads"] == two["settings"]["threads"] == int(threads)
    assert rows(tmp_path / "1") == rows(tmp_path / "2"), "values per image are equal bit for bit"
    for name, row in one["metrics"].items():
        for key in ("mean", "low", "high", "median") if name != "frechet" else ("mean",):
            assert two["metrics"][name][key] == pytest.approx(row[key], rel=1e-9), name


def test_optimised_codes_are_closer(psp, tmp_path: Path) -> None:
    errors = []
    for more in ([], ["refine=optimize", "refine.steps=4", "refine.losses.perceptual=0"]):
        done = psp("evaluate", "ckpt=toyfaces/inversion", "metric=[mse]", "data.limit=1", "timing=0", *QUIET, *more)
        assert done.code == 0, done.err
        errors.append(load(tmp_path / "evaluation")["metrics"]["mse"]["mean"])
    assert errors[1] < errors[0]
    assert load(tmp_path / "evaluation")["name"] == "toyfaces/inversion + 4 steps"


def test_a_generator_is_enough_to_optimise(psp, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copyfile(resolve("toyfaces/generator"), tmp_path / "run" / "generator.safetensors")
    settings = ["embed=optimize", "embed.steps=1", "metric=[mse]", "data.limit=1", "timing=0", *QUIET]
    done = psp("evaluate", "ckpt=run", *settings)
    assert done.code == 0, done.err
    assert load(tmp_path / "evaluation")["name"] == "run + average + 1 step"


def test_mixed_outputs(psp, tmp_path: Path) -> None:
    mix = ["mix.latent_mask=[4,5,6,7,8,9]", "mix.n_outputs=3", "metric=[miou,diversity]"]
    done = psp("evaluate", "ckpt=toyfaces/sketch2face", *mix, *FAST)
    assert done.code == 0, done.err
    assert 0 < load(tmp_path / "evaluation")["metrics"]["diversity"]["mean"] < 2


def test_what_cannot_be_measured_has_a_reason(psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "none"))
    settings = ["metric=[mse,lpips,fid,frechet]", "timing=0", "data.limit=1", *QUIET]
    done = psp("evaluate", "ckpt=identity", *settings)
    assert done.code == 1 and "Traceback" not in done.err
    metrics = load(tmp_path / "evaluation")["metrics"]
    assert metrics["mse"]["mean"] == 0 and metrics["mse"]["error"] is None
    for name, reason in (
        ("lpips", "psp-weights get alexnet"),
        ("fid", "metric.fid.weights"),
        ("frechet", "at least two"),
    ):
        assert metrics[name]["mean"] is None and reason in metrics[name]["error"] and reason in done.err, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give either ckpt=NAME_OR_RUN, or outputs=DIR and targets=DIR"),
        (["outputs=outputs"], "targets=DIR must be given too"),
        (["ckpt=toyfaces/inversion", "task=sketch2face"], "was trained for inversion: it takes rgb images"),
        (["ckpt=identity", "task=sketch2fase"], "task=sketch2fase does not exist. Did you mean 'sketch2face'?"),
        (["ckpt=toyfaces/inversion", "factor=4"], "factor=4 is for superres"),
        (["ckpt=toyfaces/inversoin"], "Did you mean 'toyfaces/inversion'?"),
        (["ckpt=identity", "as=int"], "as=int is unknown"),
        (["ckpt=identity", "refine=optimize"], "ckpt=identity has no codes: embed or refine would have no effect"),
        (["ckpt=toyfaces/superres", "factor=8", "refine=optimize"], "refine=optimize makes the output equal to the"),
        (["ckpt=toyfaces/inversion", "task=frontalization", "refine=optimize"], "the target of task=frontalization is"),
        (["outputs=outputs", "targets=targets", "task=superres"], "measured as they are: task would have no effect"),
        (
            ["ckpt=toyfaces/inversion", "refine=optimize", "refine.losses={l1: 1}"],
            "no configuration key 'refine.losses.l1'",
        ),
        (["outputs=outputs", "targets=targets", "output=targets/new"], "output=targets/new is in targets=targets"),
        (["outputs=outputs", "targets=targets", "output=outputs/0.png", "images=0"], "outputs/0.png is a file"),
        (["ckpt=identity", "data=folders"], "Did you mean 'folder'?"),
        (["ckpt=identity", "data=generated"], "data=generated has no images to measure on. Use data=toyfaces"),
        (["ckpt=identity", "data=folder"], "needs data.root=DIR"),
        (["ckpt=identity", "metric=[mae]"], "metric=mae does not exist. Did you mean 'mse'?"),
        (["outputs=nothing", "targets=targets"], "outputs=nothing is not a folder"),
        (["outputs=empty", "targets=targets"], "contain no images"),
        (["outputs=outputs", "targets=more"], "1 target without an output: 3.png"),
        (["outputs=outputs", "targets=small"], "has 64 x 64 pixels, but its target"),
    ],
)
def test_mistakes(psp, folders: list[str], tmp_path: Path, settings: list[str], message: str) -> None:
    for name, size, files in (("empty", 0, ()), ("more", 64, range(4)), ("small", 32, range(3))):
        (tmp_path / name).mkdir()
        for index in files:
            Image.new("RGB", (size, size)).save(tmp_path / name / f"{index}.png")
    done = psp("evaluate", *settings, *QUIET)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "evaluation" / "metrics.json").exists()


@pytest.mark.parametrize("when", ["measuring", "writing", "terminated"])
def test_kill_leaves_nothing_half_written(
    shell, psp, folders: list[str], tmp_path: Path, monkeypatch, when: str
) -> None:
    (tmp_path / "my_kill.py").write_text(KILL)
    metric = ["+metric.watched._target_=my_kill.Watched", "metric=[mse]", "images=1", *folders, *QUIET]
    if when == "writing":  # over the results of an earlier evaluation, which must not be mixed with these
        assert psp("evaluate", *folders, "as=float", "metric=[psnr]", *QUIET).code == 0
    done = shell("evaluate", *metric, KILL=when, PYTHONPATH=path_with(tmp_path))
    assert done.code == (130 if when == "terminated" else -9) and "Traceback" not in done.err, done.err
    assert ("interrupted" in done.err) == (when == "terminated"), done.err
    left = {path.name for path in (tmp_path / "evaluation").rglob("*") if not path.name.startswith(".")}
    assert "metrics.json" not in left and ("per_image.csv" in left) == (when == "writing"), left
    for path in (tmp_path / "evaluation").glob("images/[!.]*.png"):
        Image.open(path).load()
    monkeypatch.syspath_prepend(tmp_path)
    for output in ("evaluation", "never_killed"):
        assert psp("evaluate", *metric, f"output={output}").code == 0
    first, second = (load(tmp_path / name) for name in ("evaluation", "never_killed"))
    assert first == second and rows(tmp_path / "evaluation") == rows(tmp_path / "never_killed")


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_help_fits_a_screen(psp) -> None:
    done = psp("evaluate", "--help")
    assert done.code == 0 and len(done.out.splitlines()) <= 50
    assert max(map(len, done.out.splitlines())) <= 120


@pytest.fixture
def faces(tmp_path: Path, photos: Path) -> list[str]:
    """Write four photos as targets and outputs, of which one output and one target are grey; return the settings."""
    pytest.importorskip("facenet_pytorch")
    for name in ("outputs", "targets"):
        (tmp_path / name).mkdir()
        for index, photo in enumerate(("face_0.jpg", "face_1.jpg", "face_2.jpg", "face_0.jpg")):
            image = Image.open(photos / photo).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
            if (name, index) in (("outputs", 1), ("targets", 3)):
                image = Image.new("RGB", (256, 256), "gray")
            image.save(tmp_path / name / f"{index}.png")
    return ["outputs=outputs", "targets=targets", *QUIET]


@pytest.mark.slow
def test_aligned_faces(psp, faces: list[str], tmp_path: Path) -> None:
    metrics = "metric=[id_aligned,id_similarity]"
    for name, more in (("one", ["batch_size=3"]), ("two", ["batch_size=1", "devices=2"])):
        done = psp("evaluate", *faces, metrics, f"output={name}", *more)
        assert done.code == 0, done.err
    missing = {"1.png": "no face in the output", "3.png": "no face in the target"}
    assert (
        "id_aligned: 2 of 4 images have a value; not 1.png (no face in the output), 3.png (no face in the target)"
        in done.err
    )
    page = (tmp_path / "two" / "report.html").read_text()
    assert ", 2 of 4 |" in done.out and "2 of 4 images" in page and "<li>1.png: no face in the output</li>" in page
    one, two = load(tmp_path / "one")["metrics"], load(tmp_path / "two")["metrics"]
    row = one["id_aligned"]
    assert row["missing"] == missing and row["n_images"] == 2 and row["mean"] == pytest.approx(1, abs=1e-6)
    assert row["convention"].endswith("aligned at 112 px, toyfaces/identity") and row["error"] is None
    assert one["id_similarity"]["missing"] == {} and one["id_similarity"]["n_images"] == 4
    for name in one:
        assert two[name]["missing"] == one[name]["missing"]
        for key in ("mean", "low", "high", "median"):
            assert two[name][key] == pytest.approx(one[name][key], rel=1e-9), name
    assert [bool(line["id_aligned"]) for line in rows(tmp_path / "one")] == [True, False, True, False]


def test_no_face_in_any_image_fails_only_the_metric_that_aligns_them(psp, faces: list[str], tmp_path: Path) -> None:
    for index in (0, 2):
        (tmp_path / "outputs" / "1.png").replace(tmp_path / "outputs" / f"{index}.png")
        Image.new("RGB", (256, 256), "gray").save(tmp_path / "outputs" / "1.png")
    done = psp("evaluate", *faces, "metric=[mse,id_aligned]")
    assert done.code == 1 and "Traceback" not in done.err
    reason = "no image has a value. 3 images: no face in the output. 1 image: no face in the target."
    assert f"error: id_aligned: {reason}" in done.err
    metrics = load(tmp_path / "evaluation")["metrics"]
    assert metrics["mse"]["error"] is None and metrics["id_aligned"]["error"] == reason
    assert metrics["id_aligned"]["mean"] is None and len(metrics["id_aligned"]["missing"]) == 4


def test_without_the_face_detector_the_other_metrics_are_measured(psp, faces: list[str], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    done = psp("evaluate", *faces, "metric=[mse,id_aligned]")
    assert done.code == 1 and done.err.count("\n") == 1 and "| not measured |" in done.out
    assert "error: id_aligned: The metric id_aligned needs" in done.err
    assert "pip install --no-deps facenet-pytorch==2.6.0" in done.err

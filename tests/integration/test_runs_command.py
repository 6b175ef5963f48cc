"""psp-runs: the list of runs, and the page that compares some of them."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

import psp_lightning
from psp_lightning.lit.run_folder import claim_run
from tests.integration.test_run_folders import GENERATOR, TINY
from tests.unit.run_files import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with three runs of two tasks, of which one belongs to a sweep."""
    home = tmp_path / "runs"
    write_run(home / "inversion" / "a <&> é")
    write_run(home / "inversion" / "b", seed=1, lr=1e-3, done=20)
    write_run(home / "multirun" / "s" / "0", "superres")
    return home


def test_trainings_are_listed(psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert psp("train", *TINY, "trainer.max_steps=2", "run=first").code == 0
    assert psp("train", "-m", *TINY, "task=inversion,superres", "hydra.sweep.dir=runs/multirun/s").code == 0
    assert psp("train_generator", *GENERATOR, "run=maker").code == 0
    options = {"losses": {"l2": 1.0}, "batch_size": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    psp_lightning.fit("inversion", psp_lightning.ToyFaces(n=4), run="runs/python", steps=3, **options)
    done = psp("runs", "format=json", "sort=name")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)}
    tasks = {"first": "inversion", "maker": "generator", "python": "inversion", "s/0": "inversion", "s/1": "superres"}
    assert {name: row["task"] for name, row in rows.items()} == tasks
    assert {name: (row["step"], row["steps"]) for name, row in rows.items()} == {
        "first": (2, 2), "maker": (1, 1), "python": (3, 3), "s/0": (1, 1), "s/1": (1, 1),
    }  # fmt: skip
    assert all(row["state"] == "finished" and row["seconds"] > 0 for row in rows.values()), rows
    assert {name for name, row in rows.items() if row["best_name"] == "val/loss" and row["best"] > 0} == {
        "first", "python", "s/0", "s/1",
    }  # fmt: skip
    assert rows["s/1"]["path"] == "runs/multirun/s/1"


@pytest.mark.parametrize(("command", "settings"), [("train", TINY), ("train_generator", GENERATOR)])
def test_a_killed_part_counts(command: str, settings: list[str], psp, tmp_path: Path) -> None:
    assert psp(command, *settings, "hydra.run.dir=run").code == 0
    log = tmp_path / "run" / "train.log"
    logger = {"train": "psp_train", "train_generator": "psp_train_generator"}[command]
    log.write_text(f"[2024-01-05 12:00:00,250][{logger}][INFO] - 1 step; run directory run\n")  # and killed
    written = datetime(2024, 1, 5, 13).timestamp()
    os.utime(tmp_path / "run" / "checkpoints" / "last.ckpt", (written, written))
    assert psp(command, "resume=run", "trainer.max_steps=2").code == 0
    row = json.loads(psp("runs", "runs=run", "format=json").out)[0]
    assert row["state"] == "finished" and 3600 < row["seconds"] < 3900, log.read_text()


def test_formats(psp, runs: Path) -> None:
    table = psp("runs", "sort=name")
    lines = table.out.splitlines()
    assert table.code == 0 and len(lines) == 4 and lines[0].split()[:4] == ["name", "task", "state", "steps"]
    assert "interrupted  20 of 40" in lines[2] and "val/loss 1.05" in lines[2] and "runs/inversion/b" in lines[2]
    as_csv = list(csv.DictReader(io.StringIO(psp("runs", "list", "sort=name", "format=csv").out)))
    as_json = json.loads(psp("runs", "sort=name", "format=json").out)
    assert [row["name"] for row in as_csv] == [row["name"] for row in as_json] == ["a <&> é", "b", "s/0"]
    assert as_csv[0].keys() == as_json[0].keys() and float(as_csv[1]["best"]) == as_json[1]["best"]
    assert [row["name"] for row in json.loads(psp("runs", "task=superres", "format=json").out)] == ["s/0"]


def test_a_damaged_run_is_a_row_with_its_reason(psp, runs: Path) -> None:
    (runs / "inversion" / "b" / "config.yaml").write_text("a: [")
    done = psp("runs")
    assert done.code == 1 and "config.yaml cannot be read" in done.out and len(done.out.splitlines()) == 4


def test_a_running_training_is_listed_as_running(psp, runs: Path) -> None:
    claim = claim_run(runs / "inversion" / "b", True, "")
    states = {row["name"]: row["state"] for row in json.loads(psp("runs", "format=json").out)}
    claim.release()
    assert states == {"a <&> é": "finished", "b": "running", "s/0": "finished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=nowhere"], "there is no folder nowhere"),
        (["task=invers"], "Did you mean 'inversion'? Tasks: inversion, superres."),
        (["sort=new"], "newest"),
        (["format=xml"], "table"),
        (["compar", "b"], "Did you mean 'compare'?"),
        (["compare", "b"], "at least two runs"),
        (["compare", "b", "bb"], "there is no run 'bb'"),
        (["compare", "b", "s/0", "out=page.pdf"], "must end in .html"),
    ],
)
def test_mistakes(arguments: list[str], message: str, psp, runs: Path) -> None:
    done = psp("runs", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err
    assert not list(runs.parent.glob("*.html"))


def test_no_runs_are_no_mistake(psp, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert [psp("runs", f"format={kind}").out for kind in ("table", "json")] == ["no runs in runs\n", "[]\n"]
    header = psp("runs", "format=csv").out
    write_run(tmp_path / "runs" / "inversion" / "a")
    assert header.count("\n") == 1 and psp("runs", "format=csv").out.startswith(header)


def test_missing_packages_are_one_message(psp, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = psp("runs", "compare", "b", "s/0")
    assert done.code == 1 and done.err == "error: psp-runs compare needs jinja2: pip install 'psp-lightning[demo]'\n"
    assert psp("runs").code == 0


# --- the page


@pytest.fixture
def packages() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")


def test_the_page_has_values_and_settings(packages: None, psp, runs: Path) -> None:
    done = psp("runs", "compare", "a <&> é", "b", "out=pages/two.html")
    assert done.code == 0 and done.out == "2 runs compared: pages/two.html\n", done.err
    page = (runs.parent / "pages" / "two.html").read_text(encoding="utf-8")
    assert "<th>optimizer.lr</th>" in page and "<th>seed</th>" in page and "dirpath" not in page
    assert 'class="best">0.025' in page and 'class="best">14' in page  # the smaller loss, the larger psnr
    assert page.count("<svg") == 4 and page.count("<img") == 2, "a plot for each value, a grid for each run"
    assert "validation, step 40" in page and "validation, step 20" in page
    assert "a &lt;&amp;&gt; é" in page and "http" not in page.replace("http://www.w3.org", ""), "opens offline"


def test_runs_of_different_tasks_are_compared_in_what_they_share(packages: None, psp, runs: Path) -> None:
    log = runs / "multirun" / "s" / "0" / "csv" / "metrics.csv"
    log.write_text(log.read_text().replace("val/psnr", "val/ssim"))
    done = psp("runs", "compare", "b", "s/0")
    page = (runs.parent / "comparison.html").read_text(encoding="utf-8")
    assert done.code == 0 and page.count("<svg") == 3 and "different tasks" in page, done.err
    assert "not shown: psnr, ssim." in page


def test_what_is_damaged_is_left_out_and_reported(packages: None, psp, runs: Path) -> None:
    (runs / "inversion" / "b" / "images" / "val_00000020.png").write_bytes(b"\x89PNG")
    (runs / "multirun" / "s" / "0" / "csv" / "metrics.csv").write_text("a\n1\n")
    done = psp("runs", "compare", "a <&> é", "b", "s/0")
    page = (runs.parent / "comparison.html").read_text(encoding="utf-8")
    assert done.code == 1 and "3 runs compared" in done.out
    assert "val_00000020.png is not a complete picture" in done.err and "no column 'step'" in done.err
    assert page.count("<img") == 2 and "no column" in page


def test_equal_runs_give_equal_pages(packages: None, psp, runs: Path) -> None:
    for name in ("1.html", "2.html"):
        assert psp("runs", "compare", "b", "s/0", f"out={name}").code == 0
    assert (runs.parent / "1.html").read_bytes() == (runs.parent / "2.html").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_the_page_in_a_browser(packages: None, width: int, dark: bool, look, psp, runs: Path) -> None:
    assert psp("runs", "compare", "a <&> é", "b", "s/0").code == 0
    seen = look(runs.parent / "comparison.html", width, dark)
    assert seen["images"] == seen["shown"] == 3 and set(seen["addresses"]) == {"data:image"}
    assert seen["plots"] == 4 and seen["width"] <= width, "no sideways scrolling"
    assert "a <&> é" in seen["text"] and "optimizer.lr" in seen["text"]

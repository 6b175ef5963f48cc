"""The report of psp-evaluate, in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_lightning.cli.report import COLOURS, write_report
from psp_lightning.lit.results import failure, save_results, summary

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def evaluation(folder: Path, name: str, seed: int, error: str | None = None) -> Path:
    """Write an evaluation of 30 images with two metrics, of which `error` may spoil the second."""
    rng = np.random.default_rng(seed)
    columns = {"mse": rng.random(30).tolist(), "ssim": rng.random(30).tolist()}
    facts = {"unit": "", "convention": "RGB in [-1, 1]"}
    rows = {
        "mse": {**summary(columns["mse"]), **facts, "better": "lower", "error": None},
        "ssim": {**summary(columns["ssim"]), **facts, "better": "higher", "error": None},
    }
    if error:
        del columns["ssim"]
        rows["ssim"] |= {**dict.fromkeys(("mean", "low", "high", "median")), "error": error}
    shown = []
    (folder / "images").mkdir(parents=True)
    for index, which in enumerate(("best", "median", "worst")):
        entry = {"index": index, "name": f"{which} <&> é.png", "which": which}
        for kind in ("source", "target", "output"):
            entry[kind] = f"images/{index}_{kind}.png"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / entry[kind])
        shown.append(entry)
    record = {
        "format": 1, "name": name, "checkpoint": name, "checkpoint_sha256": "0" * 64, "task": "inversion",
        "as": "uint8", "n_images": 30, "files_sha256": "0" * 64, "settings": {"device": "cpu"}, "versions": {},
        "seconds_per_image": 0.01 * (seed + 1), "peak_memory_mib": 100.0, "metrics": rows,
        "images": {"folder": "images", "shown": shown},
    }  # fmt: skip
    save_results(folder, record, [f"{i}.png" for i in range(30)], columns)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])  # Chromium's windows are not narrower
def test_every_image_and_plot_is_shown(look, tmp_path: Path, width: int) -> None:
    folders = [evaluation(tmp_path / "a", "toyfaces/<one>", 0), evaluation(tmp_path / "b", "two", 1)]
    write_report(tmp_path / "one.html", folders[:1])
    write_report(tmp_path / "all.html", folders)
    seen = look(tmp_path / "one.html", width)
    assert seen["images"] == seen["shown"] == 9 and set(seen["addresses"]) == {"data:image"}
    assert seen["plots"] == 2 and seen["width"] <= width, "a histogram per metric, no sideways scrolling"
    assert "toyfaces/<one>" in seen["text"] and "best <&> é.png" in seen["text"]
    seen = look(tmp_path / "all.html", width, dark=True)
    assert seen["images"] == seen["shown"] == 18 and seen["width"] <= width
    assert seen["plots"] == 4, "two histograms, and two plots of quality against time"


def test_values_and_errors_are_in_the_page(tmp_path: Path) -> None:
    good, bad = evaluation(tmp_path / "a", "good", 0), evaluation(tmp_path / "b", "bad", 1, "weights are missing")
    write_report(tmp_path / "report.html", [bad])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = json.loads((bad / "metrics.json").read_text())["metrics"]["mse"]
    assert all(f"{row[key]:.4g}" in page for key in ("mean", "low", "high", "median"))
    assert "weights are missing" in page and "http" not in page.replace("http://www.w3.org", ""), "opens offline"
    write_report(tmp_path / "report.html", [good, bad])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    means = [json.loads((folder / "metrics.json").read_text())["metrics"]["mse"]["mean"] for folder in (good, bad)]
    assert f'class="best">{min(means):.4g}' in page and f'class="best">{max(means):.4g}' not in page
    assert "<b>ssim of bad</b>" in page and page.count("weights are missing") == 1


def test_a_reason_is_given_once_and_failed_jobs_have_rows(tmp_path: Path) -> None:
    bad = [evaluation(tmp_path / name, name, seed, "weights are missing") for seed, name in enumerate("ab")]
    write_report(tmp_path / "report.html", bad, [failure("c", "no <file>"), failure("d", "no <file>")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>4 evaluations</h1>" in page and page.count("weights are missing") == page.count("no &lt;file&gt;") == 1
    assert "<b>ssim</b>" in page and "<b>c; d</b>" in page and page.count(">failed</td>") == 2
    write_report(tmp_path / "report.html", bad[:1], [failure("c", "no file")])
    assert "<h1>2 evaluations</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_and_colours_stand_once_above_the_plots(tmp_path: Path) -> None:
    """Legends inside the plots covered the lines."""
    folders = [evaluation(tmp_path / "a", "first one", 0), evaluation(tmp_path / "b", "second one", 1)]
    write_report(tmp_path / "report.html", folders)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not any("first one" in plot for plot in re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert page.count('<p class="key">') == 2
    for colour, name in zip(COLOURS, ("first one", "second one"), strict=False):
        assert page.count(f'<i style="background: {colour}"></i>{name}') == 2
        assert len(re.findall(f"<path[^>]*stroke: {colour}", page)) >= 4, "a line or a mark in each plot"


def test_an_evaluation_that_failed_does_not_decide_what_is_best(tmp_path: Path) -> None:
    """A metric that could not be built does not know which direction is better."""
    folders = [evaluation(tmp_path / name, name, seed) for seed, name in enumerate(("a", "b", "c"))]
    file = folders[0] / "metrics.json"
    record = json.loads(file.read_text())
    record["metrics"]["ssim"] |= {**dict.fromkeys(("mean", "low", "high", "median", "better")), "error": "missing"}
    file.write_text(json.dumps(record))
    write_report(tmp_path / "report.html", folders)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    means = [json.loads((folder / "metrics.json").read_text())["metrics"]["ssim"]["mean"] for folder in folders[1:]]
    assert f'class="best">{max(means):.4g}' in page and "ssim (higher is better)" in page


def test_a_page_without_values_has_no_empty_section(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", "one", 0)
    (folder / "per_image.csv").write_text("index,name\n0,0.png\n")
    record = json.loads((folder / "metrics.json").read_text())
    record["images"]["shown"] = []
    (folder / "metrics.json").write_text(json.dumps(record))
    write_report(tmp_path / "report.html", [folder])
    assert "Distribution" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_equal_evaluations_give_equal_pages(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "a", "one", 0)
    for name in ("first", "second"):
        write_report(tmp_path / f"{name}.html", [folder])
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()

"""The pages show the stored measurements of the toy domain, and these were made with the shipped files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.toyfaces import edits, generator
from benchmarks.toyfaces.results import KEPT, PAGE, RESULTS, page, shipped_rows, table, trained_rows
from psp_lightning.inference.frozen import freeze_psp_generator
from psp_lightning.inference.invert import keep_codes
from psp_lightning.loading import load_psp

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "src/psp_lightning/weights/toyfaces/records.json").read_text())


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_measurements(results: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, results) == text, "run python -m benchmarks.toyfaces.results --page"


def test_the_readme_shows_the_inversion_figures(results: dict[str, Any]) -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, verb in (("inversion", "reaches a PSNR of "), ("inversion_refined", "reaches ")):
        row = results[f"tasks: {name}"]
        psnr, similarity = (row["metrics"][metric]["mean"] for metric in ("psnr", "id_similarity"))
        figures = (
            f"{psnr:.1f} dB and an identity similarity of {similarity:.2f}, at {1000 * row['seconds_per_image']:.0f} ms"
        )
        assert f"`toyfaces/{name}` {verb}{figures}" in text, f"README.md should contain: {figures}"


def test_every_row_was_measured(results: dict[str, Any]) -> None:
    rows = {row.key: row for row in (*shipped_rows(), *trained_rows())}
    assert set(results) <= set(rows) and {row.key for row in shipped_rows()} <= set(results)
    for key, row in rows.items():
        if key not in results:
            continue  # the page says how many trainings were measured
        assert list(results[key]["metrics"]) == row.metrics.split(","), key
        assert results[key]["arguments"] == list(row.arguments), key
        assert not [name for name, values in results[key]["metrics"].items() if values["mean"] is None], key


def test_the_numbers_come_from_the_shipped_files(results: dict[str, Any]) -> None:
    for key, row in results.items():
        (name,) = [a for a in row["arguments"] if a.startswith("ckpt=")] or [""]
        if name.startswith("ckpt=toyfaces/"):
            assert row["checkpoint_sha256"] == RECORDS[name.removeprefix("ckpt=")]["sha256"], key
    measured = json.loads(generator.RESULTS.read_text())
    assert measured["sha256"] == {name: RECORDS[name]["sha256"] for name in generator.MEASURED}
    assert measured["frechet"]["images"] == 10_000


def test_the_refiner_page_shows_the_edits() -> None:
    measured = json.loads(edits.RESULTS.read_text(encoding="utf-8"))
    text = edits.PAGE.read_text(encoding="utf-8")
    assert edits.page(text, measured) == text, "run python -m benchmarks.toyfaces.edits"
    assert set(measured["rows"]) >= {*edits.OPTIMISED} and measured["images"] == edits.IMAGES
    for name, row in measured["rows"].items():
        if name in edits.OPTIMISED:
            shipped = f"{edits.SHIPPED}_refined" if name == edits.REFINED else edits.SHIPPED
            assert row["sha256"] == RECORDS[shipped]["sha256"], f"{name} was measured with another network"
        else:
            assert row["training_steps"] == edits.TRAINING, name


def test_an_edit_is_measured() -> None:
    row = edits.measure(freeze_psp_generator(load_psp("toyfaces/inversion")), keep_codes, n=2)
    assert row.keys() == edits.COLUMNS.keys()
    assert 15 < row["psnr"] < 30 and 0.4 < row["miou_mixed"] < 1 and 10 < row["psnr_edited"] < 30


def test_the_page_shows_the_generators_distances() -> None:
    measured = json.loads(generator.RESULTS.read_text())
    text = " ".join((ROOT / "docs" / "toyfaces.md").read_text(encoding="utf-8").split())
    assert f"drawn faces is {measured['frechet']['generated']:.2f};" in text
    assert f"drawn sets of 10,000 it is {measured['frechet']['drawn']:.2f}." in text
    rows = re.findall(r"\| [\d,]+ \| [\d,]+ \| [\d.]+ \|", text)
    exports = [f"| {e['steps']:,} | {e['images']:,} | {e['frechet']:.2f} |" for e in measured["training"]["exports"]]
    assert len(rows) == 6 and set(rows) <= set(exports)


def test_published_psnr_is_converted() -> None:
    published = PAGE.read_text().split("## Published")[1]
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| (\d+\.\d+) \| (\d+\.\d+) \| 0\.", published, re.MULTILINE)
    assert len(rows) == 13
    for there, here in rows:
        assert float(here) - float(there) == pytest.approx(3.0103, abs=0.011), (there, here)


def test_a_table_averages_over_trainings() -> None:
    def values(mean: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        return dict(zip(KEPT, (mean, low, high, mean, "dB", "higher"), strict=True))

    def row(name: str, table: str, metrics: dict[str, Any], seconds: float | None = 0.0104, seed: int | None = None):
        return {"name": name, "table": table, "seed": seed, "metrics": metrics, "seconds_per_image": seconds}

    stored = {
        "a": row("a", "one", {"psnr": values(21.44, 21.3, 21.5), "fid": values(1.5)}),
        "b": row("b", "one", {"psnr": values(0.01234, 0.01, 0.014)}, None),
        "c, seed 1": row("c", "many", {"psnr": values(1.0)}, seed=1),
        "c, seed 2": row("c", "many", {"psnr": values(2.0)}, seed=2),
    }
    assert table(stored, "one").splitlines() == [
        "|  | psnr, dB | fid, dB | ms per image |",
        "| --- | --- | --- | --- |",
        "| a | 21.4 ± 0.1 | 1.50 | 10 |",
        "| b | 0.0123 ± 0.0020 |  |  |",
    ]
    assert table(stored, "many").splitlines() == [
        "|  | psnr, dB | trainings |",
        "| --- | --- | --- |",
        "| c | 1.50 ± 0.71 | 2 |",
    ]

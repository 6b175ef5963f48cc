"""The report of psp-evaluate: report.html, one file with tables, histograms and images that opens offline."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psp_lightning.cli.page import plot, write_page
from psp_lightning.lit.results import KINDS, PER_IMAGE, load_results

COLOURS = ("#5b9bd5", "#d1495b", "#66a182", "#edae49", "#8d6cab", "#7f7f7f")  # readable on white and on black


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as its files describe it.

    Attributes:
        folder: contains metrics.json, per_image.csv and the shown images.
        record: the content of metrics.json.
        values: for each metric with values per image, these values as float64; NaN for an image without a value.
    """

    folder: Path
    record: dict[str, Any]
    values: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """Return the name of the row in tables."""
        return str(self.record["name"])

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the summary of each metric by name."""
        metrics: dict[str, dict[str, Any]] = self.record["metrics"]
        return metrics

    @property
    def settings(self) -> str:
        """Return what was measured and with what, as indented JSON."""
        shown = {key: value for key, value in self.record.items() if key not in ("format", "metrics", "images")}
        return json.dumps(shown, indent=1, ensure_ascii=False)


def load_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation from its folder."""
    with (folder / PER_IMAGE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [key for key in rows[0] if key not in ("index", "name")] if rows else []
    values = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    return Evaluation(folder, load_results(folder), values)


def write_report(path: Path, folders: Sequence[Path], failed: Sequence[dict[str, Any]] = ()) -> None:
    """Write the report of one evaluation, or of several evaluations next to each other.

    Args:
        path: the HTML file.
        folders: the evaluations' folders, in the order of the rows; at least one.
        failed: evaluations without results, see `psp_lightning.lit.results.failure`.
    """
    evaluations = [load_evaluation(folder) for folder in folders]
    n = len(evaluations) + len(failed)
    names = list(dict.fromkeys(name for one in evaluations for name in one.metrics))
    write_page(
        path,
        "report.html",
        {"number": number, "embed": embed},
        title=evaluations[0].name if n == 1 else f"{n} evaluations",
        evaluations=evaluations,
        failed=failed,
        reasons=reasons(evaluations, failed),
        colours=COLOURS,
        names=names,
        best={name: best(evaluations, name) for name in names},
        kinds=KINDS,
        histograms=[svg for name in names if (svg := histogram(evaluations, name)) is not None],
        trade_offs=[(name, trade_off(evaluations, name)) for name in names if is_traded(evaluations, name)],
    )


def reasons(evaluations: Sequence[Evaluation], failed: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what was not measured, and why; what has the same reason is named together."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in evaluations:
        for name, row in one.metrics.items():
            if row["error"]:
                found.setdefault((name, row["error"]), []).append(one.name)
    for record in failed:
        found.setdefault(("", record["error"]), []).append(record["name"])
    everywhere = len(evaluations)
    return [
        (name if name and len(where) == everywhere else f"{name} of {'; '.join(where)}".removeprefix(" of "), reason)
        for (name, reason), where in found.items()
    ]


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, or an empty string for None."""
    return "" if value is None else f"{value:.{digits}g}"


def embed(picture: Path) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def best(evaluations: Sequence[Evaluation], name: str) -> float | None:
    """Return the best mean of a metric, or None if there is nothing to compare."""
    rows = [one.metrics[name] for one in evaluations if name in one.metrics]
    rows = [row for row in rows if row["mean"] is not None]
    if len(rows) < 2 or rows[0]["better"] is None:
        return None
    return (max if rows[0]["better"] == "higher" else min)(row["mean"] for row in rows)


def axis_label(evaluations: Sequence[Evaluation], name: str) -> str:
    """Return a metric's name with its unit and the better direction."""
    row = next(one.metrics[name] for one in evaluations if one.metrics.get(name, {}).get("mean") is not None)
    unit = f", {row['unit']}" if row["unit"] else ""
    return f"{name}{unit}" + (f" ({row['better']} is better)" if row["better"] else "")


def histogram(evaluations: Sequence[Evaluation], name: str) -> Any:
    """Return the histogram of a metric over the images, one line for each evaluation; None without values per image."""
    shown = [(k, one.values[name]) for k, one in enumerate(evaluations) if name in one.values]
    shown = [(k, x[np.isfinite(x)]) for k, x in shown]
    if not any(len(x) for _, x in shown):
        return None

    def draw(axes: Any) -> None:
        everything = np.concatenate([x for _, x in shown])
        edges = np.histogram_bin_edges(everything, bins=min(40, max(5, round(len(everything) ** 0.5))))
        for k, x in shown:
            axes.stairs(
                np.histogram(x, edges)[0], edges, color=COLOURS[k % len(COLOURS)], fill=len(evaluations) == 1, lw=1.5
            )
        axes.set(xlabel=axis_label(evaluations, name), ylabel="images")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return plot(draw, f"Histogram of {name} over the images", (4.6, 2.2))


def is_traded(evaluations: Sequence[Evaluation], name: str) -> bool:
    """Return whether at least two evaluations have both a time and a mean of this metric."""
    timed = [one for one in evaluations if one.record["seconds_per_image"] is not None]
    return sum(one.metrics.get(name, {}).get("mean") is not None for one in timed) > 1


def trade_off(evaluations: Sequence[Evaluation], name: str) -> Any:
    """Return a plot of a metric's mean with its interval against the seconds per image."""

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for k, one in enumerate(evaluations):
            row, seconds = one.metrics.get(name, {}), one.record["seconds_per_image"]
            if seconds is None or row.get("mean") is None:
                continue
            ends = None if row["low"] is None else [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            colour = COLOURS[k % len(COLOURS)]
            axes.errorbar([seconds], [row["mean"]], ends, fmt="o", capsize=3, color=colour)
        axes.margins(x=0.2, y=0.2)
        axes.set(xlabel="seconds per image, one at a time")
        axes.set_title(axis_label(evaluations, name), loc="left", fontsize="medium")

    return plot(draw, f"{name} against seconds per image", (4.6, 2.5))

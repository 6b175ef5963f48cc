"""Learning curves: read from a run's csv log, and drawn."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError

LOG = Path("csv") / "metrics.csv"
CURVES = "curves.png"
STAGES = ("train", "val")
POINTS = 300  # at most, per curve; a longer curve shows means over equal numbers of rows
Log = dict[str, np.ndarray]  # logged name, such as train/loss -> (n, 2) float64: step and value


def read_log(path: Path) -> Log:
    """Read a csv log; the arrays have the shape (n, 2) and contain step and value in float64.

    A last line without its end is ignored, because a training may be writing it.

    Raises:
        UserError: the file is not such a log; the message names the line.
        OSError: the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if not lines:
        return {}
    head, *rows = csv.reader(line.replace("\0", "?") for line in lines)
    if "step" not in head:
        raise UserError(f"{path} has no column 'step'.")
    column = head.index("step")
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in head if name != "step"}
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise UserError(f"{path}, line {number}: {len(row)} values instead of {len(head)}.")
        try:
            step = float(int(row[column]))
            for name, value in zip(head, row, strict=True):
                if value and name != "step":
                    points[name].append((step, float(value)))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}.") from None
    return {name: np.array(found) for name, found in points.items() if found}


def last_step(log: Log) -> int:
    """Return the last logged step, or 0 for an empty log."""
    return int(max((points[:, 0].max() for points in log.values()), default=0))


def by_value(log: Log) -> dict[str, dict[str, np.ndarray]]:
    """Return the curves of each value by stage: {"loss": {"train": points, "val": points}}; losses come first."""
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(log, key=lambda name: (not name.partition("/")[2].startswith("loss"), name.partition("/")[2])):
        stage, _, value = name.partition("/")
        if stage in STAGES and value:
            values.setdefault(value, {})[stage] = log[name]
    return values


def thin(points: np.ndarray, most: int = POINTS) -> np.ndarray:
    """Return (n, 2) points with finite values, averaged over neighbours so that at most `most` are left."""
    points = points[np.isfinite(points[:, 1])]
    if len(points) <= most:
        return points
    return np.array([part.mean(0) for part in np.array_split(points, most)])


def draw(axes: Any, curves: Mapping[str, np.ndarray], colour: str, label: str | None = None, line: str = "-") -> None:
    """Draw a value's curves into matplotlib axes: the training as a thin line, the validation as a line with dots.

    Args:
        curves: stage (`train` or `val`) -> (n, 2) points.
        colour: the colour of both.
        label: the legend's text, on the validation if there is one.
        line: matplotlib's style of the lines.
    """
    for stage, points in curves.items():
        shown, own = thin(points), label if stage == "val" or "val" not in curves else None
        if stage == "train":
            style = {"alpha": 0.6 if "val" in curves else 1, "linewidth": 1.1, "markersize": 3}
        else:
            style = {"linewidth": 1.8, "markersize": 4}
        dots = len(shown) <= (1 if stage == "train" else 30)  # a line through a single point is invisible
        axes.plot(*shown.T, line, marker="o" if dots else "", color=colour, label=own, **style)
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_curves(path: Path, log: Log) -> bool:
    """Write a PNG with one plot for each logged value; return False and write nothing if there is no value.

    Raises:
        ImportError: matplotlib is not installed.
    """
    values = by_value(log)
    if not values:
        return False
    from matplotlib.figure import Figure

    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    width, height = 4.2 * columns, 2.6 * rows  # inches
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    # fixed margins: a layout that measures its texts takes twice the time
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.3 / height, 0.25, 0.35)
    plots = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, curves) in zip(plots, values.items(), strict=False):
        for stage, colour in zip(STAGES, ("#5b9bd5", "#d1495b"), strict=True):
            if stage in curves:
                draw(axes, {stage: curves[stage]}, colour, {"train": "training", "val": "validation"}[stage])
        axes.set_title(name, fontsize=10)
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(frameon=False, labelcolor="linecolor", fontsize=9)
    for axes in figure.axes[len(values) :]:
        axes.set_axis_off()
    with replacing(path, sync=False) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
    return True

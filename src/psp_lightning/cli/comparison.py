"""The page of psp-runs compare: comparison.html, one file with curves, values, settings and image grids."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from psp_lightning.cli.mistakes import flat
from psp_lightning.cli.page import plot, write_page
from psp_lightning.cli.report import COLOURS, embed, number
from psp_lightning.lit import curves
from psp_lightning.lit.runs import Run

LINES = ("-", "--", ":", "-.")  # the next style when all colours are used
GRID = re.compile(r"(val|train|samples)_(\d+)\.png")
SHOWN = {"val": "validation", "train": "training batch", "samples": "samples"}  # kinds of grids, best first
SKIPPED = {"run", "resume", "paths.runs", "paths.output_dir", "step", "seconds"}  # these differ between any two runs


@dataclass(frozen=True)
class Shown:
    """A run on the page.

    Attributes:
        run: the run.
        label: its name; with its task, or its path, if two runs have the same name.
        colour: of its curves.
        line: style of its curves.
        grid: its newest image grid.
        caption: describes the grid.
    """

    run: Run
    label: str
    colour: str
    line: str
    grid: Path | None
    caption: str


def write_comparison(path: Path, runs: Sequence[Run]) -> list[str]:
    """Write the page.

    Args:
        path: the HTML file.
        runs: at least two runs, in the order of the rows.

    Returns:
        What could not be read, in one line each.
    """
    faults = [f"{run.folder}: {run.reason}" for run in runs if run.reason]
    kinds = ([run.name for run in runs], [f"{run.task}/{run.name}" for run in runs])
    labels = next((kind for kind in kinds if len(set(kind)) == len(runs)), [os.fspath(run.folder) for run in runs])
    shown = []
    for k, run in enumerate(runs):
        grid, caption = newest_grid(run.folder)
        if grid is not None and not is_picture(grid):
            faults.append(f"{grid} is not a complete picture.")
            grid, caption = None, "damaged picture"
        line = LINES[k // len(COLOURS) % len(LINES)]
        shown.append(Shown(run, labels[k], COLOURS[k % len(COLOURS)], line, grid, caption))
    tasks = list(dict.fromkeys(run.task for run in runs))
    values, lonely = shared([curves.by_value(run.log) for run in runs], len(tasks) > 1)
    rows, left_out = differing_settings(runs)
    measured = [f"val/{value}" for value in values if any(f"val/{value}" in run.log for run in runs)]
    directions = {name: direction(name, runs) for name in measured}
    write_page(
        path,
        "comparison.html",
        {"number": number, "embed": embed},
        title=f"{len(runs)} runs",
        shown=shown,
        tasks=tasks,
        plots=[value_plot(shown, value) for value in values],
        lonely=lonely,
        rows=rows,
        left_out=left_out,
        measured=measured,
        directions=directions,
        reached={name: [reached(run, name, directions[name]) for run in runs] for name in measured},
        faults=faults,
    )
    return faults


def newest_grid(folder: Path) -> tuple[Path | None, str]:
    """Return the image grid of the last step, of a validation if there is one, and its description."""
    found = [(match, file) for file in folder.glob("images/*.png") if (match := GRID.fullmatch(file.name))]
    for kind, text in SHOWN.items():
        own = [(int(match[2]), file) for match, file in found if match[1] == kind]
        if own:
            step, file = max(own)
            return file, f"{text}, step {step}"
    return None, "no image grid"


def is_picture(file: Path) -> bool:
    """Return whether a file is a complete PNG."""
    try:
        with Image.open(file) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):  # SyntaxError: Pillow's error for a broken PNG
        return False
    return True


def shared(runs: Sequence[dict[str, Any]], different_tasks: bool) -> tuple[list[str], list[str]]:
    """Return the logged values to plot, and those that only one run has.

    Runs of different tasks share few values, so for them only values of at least two runs are plotted.
    """
    counts: dict[str, int] = {}
    for values in runs:
        for name in values:
            counts[name] = counts.get(name, 0) + 1
    lonely = [name for name, n in counts.items() if n == 1] if different_tasks else []
    return [name for name in counts if name not in lonely], lonely


def value_plot(shown: Sequence[Shown], value: str) -> Any:
    """Return a plot of one value over the steps, one colour for each run."""

    def draw(axes: Any) -> None:
        for one in shown:
            if value in (own := curves.by_value(one.run.log)):
                curves.draw(axes, own[value], one.colour, one.label, one.line)
        axes.set_ylabel(value)
        if len(shown) <= 8 and max(len(one.label) for one in shown) <= 40:  # the table of runs has the colours, too
            axes.legend(frameon=False, labelcolor="linecolor")

    return plot(draw, f"{value} over the steps", (5.4, 2.8))


def direction(name: str, runs: Sequence[Run]) -> str | None:
    """Return which values of a logged name are better: `min`, `max`, or None if nobody knows."""
    for run in runs:
        if run.best is not None and run.best.name == name:
            return run.best.mode
    key = name.partition("/")[2]
    if key.startswith("loss"):
        return "min"
    from psp_lightning.metrics import METRICS

    higher = getattr(METRICS.get(key), "higher_is_better", None)
    return None if higher is None else "max" if higher else "min"


def reached(run: Run, name: str, better: str | None) -> tuple[float, int] | None:
    """Return the best value of a logged name and its step; the last value if it is unknown what is better."""
    points = run.log.get(name, np.empty((0, 2)))
    points = points[np.isfinite(points[:, 1])]
    if not len(points):
        return None
    index = -1 if better is None else int((np.argmax if better == "max" else np.argmin)(points[:, 1]))
    return float(points[index, 1]), int(points[index, 0])


def differing_settings(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str | None]]], int]:
    """Return the settings that differ, each with its value in every run, and the number of those left out.

    For runs of different tasks, settings that only some runs have are left out. Paths inside a run's own folder are
    compared relative to it.
    """
    tables = []
    for run in runs:
        own = str(run.settings.get("paths", {}).get("output_dir") or run.folder)
        tables.append({key: _text(value, own) for key, value in flat(run.settings).items() if key not in SKIPPED})
    keys = list(dict.fromkeys(key for table in tables for key in table))
    partly = [key for key in keys if any(key not in table for table in tables if table)]
    left_out = set(partly) if len({run.task for run in runs}) > 1 else set()
    rows = [(key, [table.get(key) for table in tables]) for key in keys if key not in left_out]
    known = [bool(table) for table in tables]
    differing = [row for row in rows if len({v for v, ok in zip(row[1], known, strict=True) if ok}) > 1]
    return differing, len(left_out)


def _text(value: Any, folder: str) -> str:
    """Return a setting as it is typed; leave out the modules of this library's classes."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value).replace(folder, "RUN")
    return text.rpartition(".")[2] if re.fullmatch(r"psp_lightning(\.\w+)+", text) else text

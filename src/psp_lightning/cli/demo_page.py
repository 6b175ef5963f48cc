"""The output of psp-demo: index.html next to its pictures, and demo.png, one sheet with everything."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from psp_lightning.cli import page
from psp_lightning.cli.page import INK, plot
from psp_lightning.lit.curves import read_log
from psp_lightning.utils.images import save_atomic
from psp_lightning.utils.pictures import open_8bit

Losses = dict[str, list[tuple[int, float]]]  # name of a curve -> list of (step, value)
SheetRow = tuple[str | Path, Sequence[Path]]  # label, as text or a picture, and the pictures of the row
FAINT, LINE, DOTS = "#6e6e6e", "#5b9bd5", "#d1495b"
CELL, GAP, MARGIN, LABEL, HEADING, GRAPH = 88, 5, 14, 118, 30, 230  # in pixels, on the sheet


@dataclass(frozen=True)
class Picture:
    """An image file and its alternative text."""

    path: Path
    shows: str


@dataclass(frozen=True)
class Part:
    """One section of the page.

    Attributes:
        title: the heading.
        text: explains the pictures.
        commands: the command lines that made them.
        rows: lists of cells; a cell is a list of pictures, from top to bottom.
        losses: plotted below the rows.
        wide: pictures shown side by side in their own proportions.
    """

    title: str
    text: str
    commands: list[str]
    rows: list[list[list[Picture]]] = field(default_factory=list)
    losses: Losses = field(default_factory=dict)
    wide: list[Picture] = field(default_factory=list)


def read_losses(path: Path) -> Losses:
    """Read the training and validation losses from a run's `metrics.csv`."""
    log = read_log(path)
    return {
        name: [(int(step), float(value)) for step, value in log.get(key, ())]
        for name, key in (("training", "train/loss"), ("validation", "val/loss"))
    }


def write_page(path: Path, **values: Any) -> None:
    """Render demo_page.html to `path`, with the pictures' paths relative to it.

    Args:
        path: the HTML file.
        values: `title`, `intro`, `parts` (list of `Part`), `links` (text -> address), `footer`.
    """
    address = lambda picture: quote(picture.relative_to(path.parent).as_posix())  # noqa: E731
    curve = lambda losses: plot(partial(_plot, losses=losses), "Training and validation losses by step")  # noqa: E731
    page.write_page(path, "demo_page.html", {"address": address, "curve": curve}, **values)


def write_sheet(
    path: Path, groups: Sequence[tuple[str, Sequence[SheetRow]]], losses: Losses, losses_title: str
) -> None:
    """Write a PNG with a heading and rows for each group, and at the end a plot of the losses under `losses_title`."""
    from matplotlib.figure import Figure

    n = max(len(pictures) for _, rows in groups for _, pictures in rows)
    width = 2 * MARGIN + LABEL + n * (CELL + GAP) - GAP
    height = 2 * MARGIN + sum(HEADING + len(rows) * (CELL + GAP) + 8 for _, rows in groups) + HEADING + GRAPH
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="center", **style)

    def paste(x: int, y: int, picture: Path) -> None:
        cell = open_8bit(picture, "RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
        figure.figimage(np.asarray(cell), x, height - y - CELL)

    y = MARGIN
    for title, rows in groups:
        write(MARGIN, y + HEADING / 2, title, color=INK, fontsize=12)
        y += HEADING
        for label, pictures in rows:
            if isinstance(label, Path):
                paste(MARGIN + LABEL - CELL - 12, y, label)
            else:
                write(MARGIN, y + CELL / 2, label, color=FAINT, fontsize=10)
            for k, picture in enumerate(pictures):
                paste(MARGIN + LABEL + k * (CELL + GAP), y, picture)
            y += CELL + GAP
        y += 8
    write(MARGIN, y + HEADING / 2, losses_title, color=INK, fontsize=12)
    bottom, top = 40, GRAPH - 10
    _plot(figure.add_axes((50 / width, (MARGIN + bottom) / height, 1 - 80 / width, (top - bottom) / height)), losses)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    # a palette with dithering needs a third of the bytes, without a visible difference
    sheet = Image.open(buffer).convert("RGB")
    palette = sheet.quantize(256, kmeans=3)
    save_atomic(sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG), path, optimize=True)


def _plot(axes: Any, losses: Losses) -> None:
    """Plot the training loss as a line and the validation loss as dots; both axes start at 0."""
    for (name, points), colour, marks in zip(losses.items(), (LINE, DOTS), ("-", "o"), strict=True):
        axes.plot(*np.array(points).reshape(-1, 2).T, marks, color=colour, label=f"{name} loss")
    axes.set(xlabel="step", xlim=(0, None), ylim=(0, None))
    axes.grid(axis="y", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor="linecolor")

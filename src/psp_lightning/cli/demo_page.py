"""The output of psp-demo: index.html next to its pictures, and demo.png, one sheet with everything."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import save_atomic
from psp_lightning.utils.pictures import open_8bit

Losses = dict[str, list[tuple[int, float]]]  # name of a curve -> list of (step, value)
SheetRow = tuple[str | Path, Sequence[Path]]  # label, as text or a picture, and the pictures of the row
INK, FAINT, LINE, DOTS = "#222222", "#6e6e6e", "#5b9bd5", "#d1495b"
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


def check_packages() -> None:
    """Raise a UserError if matplotlib or jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"psp-demo needs {error.name}: pip install 'psp-lightning[demo]'") from None


def read_losses(path: Path) -> Losses:
    """Read the training and validation losses from a run's `metrics.csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        for name, key in (("training", "train/loss"), ("validation", "val/loss"))
    }


def write_page(path: Path, **values: Any) -> None:
    """Render demo_page.html to `path`, with the pictures' paths relative to it.

    Args:
        path: the HTML file.
        values: `title`, `intro`, `parts` (list of `Part`), `links` (text -> address), `footer`.
    """
    import jinja2

    template = Path(__file__).with_name("demo_page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["address"] = lambda picture: quote(picture.relative_to(path.parent).as_posix())
    environment.filters["curve"] = _curve_svg
    page = environment.from_string(template).render(**values)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def write_sheet(
    path: Path, groups: Sequence[tuple[str, Sequence[SheetRow]]], losses: Losses, losses_title: str
) -> None:
    """Write a PNG with a heading and rows for each group, and a plot of the losses under `losses_title` at the end."""
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
    # a palette with dithering takes a third of the bytes, without a visible difference
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


def _curve_svg(losses: Losses) -> Any:
    """Return a plot of the losses as an inline SVG element, with text in the page's colour."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    style: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": "psp-demo"}):
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        _plot(figure.add_subplot(), losses)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    label = 'role="img" aria-label="Training and validation losses by step"'
    return Markup(svg[svg.index("<svg") :].replace("<svg", f"<svg {label}", 1))

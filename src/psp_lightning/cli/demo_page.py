"""What psp-demo shows: index.html beside its pictures, and demo.png, one sheet with everything."""

from __future__ import annotations

import csv
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from psp_lightning.utils.images import save_atomic


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows, for those who cannot see it."""

    path: Path
    shows: str


@dataclass(frozen=True)
class Curve:
    """Losses of a run as (step, value): each logged training step, each validation."""

    train: list[tuple[int, float]]
    val: list[tuple[int, float]]

    @classmethod
    def read(cls, path: Path) -> Curve:
        """The curve in a run's `metrics.csv`."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        series = {
            key: [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
            for key in ("train/loss", "val/loss")
        }
        return cls(series["train/loss"], series["val/loss"])

    @property
    def last_step(self) -> int:
        """The last logged step, at least 1."""
        return max([1, *(step for step, _ in self.train + self.val)])

    @property
    def ticks(self) -> list[float]:
        """Round values from 0 to at least the highest loss."""
        return round_ticks(max([1e-6, *(value for _, value in self.train + self.val)]))

    def place(self, points: Sequence[tuple[int, float]], box: Sequence[float]) -> list[tuple[float, float]]:
        """Where `points` lie in `box` (left, top, right, bottom): step 0 on the left, loss 0 at the bottom."""
        left, top, right, bottom = box
        high = self.ticks[-1]
        return [
            (left + (right - left) * x / self.last_step, bottom - (bottom - top) * min(max(y / high, 0.0), 1.0))
            for x, y in points
        ]


def round_ticks(high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from 0 to the first that is not below `high`."""
    unit = 10.0 ** math.floor(math.log10(high / most))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if unit * factor * most >= high)
    return [round(step * k, 10) for k in range(math.ceil(high / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Part:
    """One section of the page.

    Args:
        title: heading.
        text: what the pictures are.
        commands: the command lines that made them.
        rows: each row holds cells, each cell its pictures from top to bottom.
        curve: the losses, drawn below.
        wide: pictures that stand beside one another in their own proportions.
    """

    title: str
    text: str
    commands: list[str]
    rows: list[list[list[Picture]]] = field(default_factory=list)
    curve: Curve | None = None
    wide: list[Picture] = field(default_factory=list)


STYLE = """
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: #222; background: #fff; }
main { max-width: 58rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.3rem; }
p { margin: 0.3rem 0 0.6rem; max-width: 44rem; }
a { color: #0b57a4; }
pre { margin: 0 0 0.8rem; padding: 0.5rem 0.7rem; background: #f2f2f0; border-radius: 4px; overflow-x: auto;
  font-size: 0.8rem; }
.row { display: grid; gap: 0.4rem; margin-bottom: 0.8rem; }
.n8 { grid-template-columns: repeat(8, 1fr); }
.n9 { grid-template-columns: repeat(9, 1fr); }
.cell img { display: block; width: 100%; margin-bottom: 2px; }
.wide { display: flex; flex-wrap: wrap; gap: 0.8rem; }
.wide figure { margin: 0; }
.wide img { display: block; max-width: 100%; }
figcaption, footer { font-size: 0.85rem; color: #666; }
svg { width: 100%; max-width: 44rem; height: auto; }
@media (max-width: 40rem) {
  .n8 { grid-template-columns: repeat(4, 1fr); }
  .n9 { grid-template-columns: repeat(3, 1fr); }
}
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1b1b1b; } pre { background: #2a2a2a; } a { color: #8ec1f5; }
  figcaption, footer { color: #aaa; }
}
"""


def write_page(path: Path, title: str, intro: str, parts: Sequence[Part], links: dict[str, str], footer: str) -> None:
    """Write the page; its pictures are named relative to it.

    Args:
        path: the HTML file.
        intro: first paragraph.
        links: text and address of documents.
        footer: last line.
    """
    text = html.escape
    shown = " · ".join(f'<a href="{text(address)}">{text(name)}</a>' for name, address in links.items())
    body = "\n".join(_section(part, path.parent) for part in parts)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{text(title)}</h1>
<p>{text(intro)}</p>
{f"<p>{shown}</p>" if shown else ""}
{body}
<footer><p>{text(footer)}</p></footer>
</main>
</body>
</html>
"""
    part_file = path.with_suffix(".part")
    part_file.write_text(page, encoding="utf-8")
    os.replace(part_file, path)


def _section(part: Part, root: Path) -> str:
    lines = [f"<section>\n<h2>{html.escape(part.title)}</h2>\n<p>{html.escape(part.text)}</p>"]
    lines.append("<pre><code>" + html.escape("\n".join(part.commands)) + "</code></pre>")
    for row in part.rows:
        cells = "\n".join(
            '<div class="cell">' + "".join(_img(picture, root) for picture in cell) + "</div>" for cell in row
        )
        lines.append(f'<div class="row n{9 if len(row) == 9 else 8}">\n{cells}\n</div>')
    if part.curve is not None:
        lines.append(curve_svg(part.curve))
    if part.wide:
        figures = (
            f"<figure>{_img(picture, root)}<figcaption>{html.escape(picture.shows)}</figcaption></figure>"
            for picture in part.wide
        )
        lines.append('<div class="wide">' + "\n".join(figures) + "</div>")
    return "\n".join([*lines, "</section>"])


def _img(picture: Picture, root: Path) -> str:
    from urllib.parse import quote

    address = quote(picture.path.relative_to(root).as_posix())
    return f'<img src="{address}" alt="{html.escape(picture.shows)}">'


TRAIN, VAL = "#5b9bd5", "#d1495b"


def curve_svg(curve: Curve) -> str:
    """The curve as an inline SVG element; its texts take the page's colour."""
    width, height, box = 720, 270, (50, 14, 705, 228)
    left, top, right, bottom = box
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss of training and validation over the steps" '
        'font-size="13" fill="currentColor">'
    ]
    for value in curve.ticks:
        y = curve.place([(0, value)], box)[0][1]
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#999" stroke-opacity="0.4"/>')
        out.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in _steps(curve):
        x = curve.place([(step, 0)], box)[0][0]
        out.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">step</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve.place(curve.train, box))
    out.append(f'<polyline points="{line}" fill="none" stroke="{TRAIN}" stroke-width="1.8"/>')
    for (x, y), (step, value) in zip(curve.place(curve.val, box), curve.val, strict=True):
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{VAL}"><title>step {step}: {value:.4g}</title></circle>'
        )
    out.append(f'<text x="{right}" y="{top + 14}" text-anchor="end" fill="{TRAIN}">training loss</text>')
    out.append(f'<text x="{right}" y="{top + 32}" text-anchor="end" fill="{VAL}">validation loss</text>')
    return "\n".join([*out, "</svg>"])


def _steps(curve: Curve) -> list[int]:
    ticks = [int(tick) for tick in round_ticks(curve.last_step) if tick == int(tick) and tick <= curve.last_step]
    return ticks or [0, curve.last_step]


CELL, GAP, MARGIN, LABEL = 88, 5, 14, 118  # pixels of the sheet
INK, FAINT = (34, 34, 34), (110, 110, 110)


@dataclass(frozen=True)
class SheetRow:
    """A line of the sheet: text (or a picture) on the left, pictures beside it."""

    label: str | Path
    pictures: list[Path]


def write_sheet(path: Path, groups: Sequence[tuple[str, Sequence[SheetRow]]], curve: Curve, curve_title: str) -> None:
    """Write one PNG with all rows and the curve.

    Args:
        path: the PNG file.
        groups: heading and rows of each part.
        curve: drawn below them.
        curve_title: its heading.
    """
    n = max(len(row.pictures) for _, rows in groups for row in rows)
    width = 2 * MARGIN + LABEL + n * (CELL + GAP) - GAP
    heading, graph = 30, 230
    height = MARGIN + sum(heading + len(rows) * (CELL + GAP) + 8 for _, rows in groups) + heading + graph + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    y = MARGIN
    for title, rows in groups:
        draw.text((MARGIN, y + 4), title, fill=INK, font=large)
        y += heading
        for row in rows:
            if isinstance(row.label, Path):
                sheet.paste(_cell(row.label), (MARGIN + LABEL - CELL - 12, y))
            else:
                draw.multiline_text((MARGIN, y + CELL / 2), row.label, fill=FAINT, font=small, anchor="lm", spacing=3)
            for k, picture in enumerate(row.pictures):
                sheet.paste(_cell(picture), (MARGIN + LABEL + k * (CELL + GAP), y))
            y += CELL + GAP
        y += 8
    draw.text((MARGIN, y + 4), curve_title, fill=INK, font=large)
    y += heading
    sheet.paste(_graph(curve, (width - 2 * MARGIN, graph)), (MARGIN, y))
    # a palette with dithering: a third of the bytes, and no difference that one sees
    palette = sheet.quantize(256, kmeans=3)
    save_atomic(sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG), path, optimize=True)


def _cell(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)


def _graph(curve: Curve, size: tuple[int, int], fine: int = 4) -> Image.Image:
    """The curve as an image: lines drawn `fine` times as large and shrunk, texts at their size."""
    box = (46, 8, size[0] - 16, size[1] - 40)
    left, top, right, bottom = box
    image = Image.new("RGB", (size[0] * fine, size[1] * fine), "white")
    draw = ImageDraw.Draw(image)
    levels = [(value, curve.place([(0, value)], box)[0][1]) for value in curve.ticks]
    for _, y in levels:
        draw.line([left * fine, y * fine, right * fine, y * fine], fill=(222, 222, 222), width=fine)
    points = [(x * fine, y * fine) for x, y in curve.place(curve.train, box)]
    if len(points) > 1:
        draw.line(points, fill=TRAIN, width=2 * fine, joint="curve")
    for x, y in curve.place(curve.val, box):
        draw.circle((x * fine, y * fine), 5 * fine, fill=VAL)
    image = image.resize(size, Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for value, y in levels:
        draw.text((left - 8, y), f"{value:g}", fill=FAINT, font=font, anchor="rm")
    for step in _steps(curve):
        draw.text((curve.place([(step, 0)], box)[0][0], bottom + 5), str(step), fill=FAINT, font=font, anchor="ma")
    draw.text(((left + right) / 2, size[1] - 3), "step", fill=FAINT, font=font, anchor="md")
    draw.text((right, top + 6), "training loss", fill=TRAIN, font=font, anchor="ra")
    draw.text((right, top + 24), "validation loss", fill=VAL, font=font, anchor="ra")
    return image

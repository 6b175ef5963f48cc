"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from psp_lightning.utils.errors import clean


def print_table(rows: Iterable[Sequence[Any]], limit: int = 120) -> None:
    """Print rows in columns; a cell has at most `limit` characters and no control characters."""
    lines = [[clean(str(cell), limit) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

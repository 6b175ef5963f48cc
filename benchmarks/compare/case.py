"""One side of a row, set up in a worker's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One side of a row, set up.

    Args:
        draw: returns new random inputs for a seed.
        run: does the work that is timed; if it returns a dict, the dict is passed on.
        check: returns tensors by name for given inputs; they must agree with those of the other sides.
        notes: notes for the results.
        floor: measures the least time that the machine needs, if it is known.
    """

    draw: Callable[[int], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    floor: Callable[[], dict[str, float]] | None = None

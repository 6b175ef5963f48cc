"""One side of a row, set up in a worker's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One side of a row, set up.

    Args:
        draw: seed to fresh random inputs.
        run: the work that is timed; what it returns as a dict is passed on.
        check: inputs to tensors by name (`Tensor` each) that must agree with the other sides'.
        notes: for the results.
        floor: measures the least time that the machine needs, where that is known.
    """

    draw: Callable[[int], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    floor: Callable[[], dict[str, float]] | None = None

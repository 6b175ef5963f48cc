"""A progress bar on stderr, which leaves stdout to the results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], name: str, total: int, show: bool = True) -> Iterator[Item]:
    """Yield `items` while a bar shows how many are done; show none if `show` is False or stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import track as shown

    console = Console(stderr=True)
    hidden = not show or not console.is_terminal
    return iter(shown(items, name, total, console=console, transient=True, disable=hidden))

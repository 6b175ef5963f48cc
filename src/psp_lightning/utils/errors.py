"""The exception for everything that a user can fix, and helpers for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """A mistake in the input, the configuration or the environment, explained in one message.

    The message names the culprit (file, key, id) and says what to do. The commands print it without a traceback and
    exit with status 1.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the option closest to `name`, or `""` if none is close."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def plural(n: int, noun: str) -> str:
    """Return "1 file" or "2 files" for the noun `file`."""
    ending = "es" if noun.endswith(("s", "ch", "sh", "x")) else "s"
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{ending}"


def clean(text: str, limit: int = 120) -> str:
    """Return text from a file on one line, cut to `limit` characters, without terminal control characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return shown if len(text) <= limit else shown[:-3] + "..."


def check_tree(value: Any, what: str) -> None:
    """Raise a UserError unless `value`, read from a file, is a small tree.

    A list that contains a list twice, which contains another list twice, and so on, takes little memory but prints
    forever.
    """
    pending, values, letters = [(value, 0)], 0, 0
    while pending:
        node, depth = pending.pop()
        values += 1
        letters += len(node) if isinstance(node, (str, bytes)) else 0
        if values > 100_000 or letters > 1 << 20 or depth > 50:
            raise UserError(f"its {what} contains more values than any network needs.")
        if isinstance(node, Mapping):
            pending.extend((child, depth + 1) for pair in node.items() for child in pair)
        elif isinstance(node, (list, tuple, set)):
            pending.extend((child, depth + 1) for child in node)

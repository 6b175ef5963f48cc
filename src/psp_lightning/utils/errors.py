"""One exception for everything that the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, the configuration or the surroundings, said in one message for a person.

    The message names the culprit (file, key, id) and what to do. The console scripts print it without a traceback
    and exit with status 1.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """The sentence `" Did you mean 'x'?"` for the option closest to `name`, or `""` where none is close."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def clean(text: str, limit: int = 120) -> str:
    """A file's own words in a message: on one line, of bounded length, without what would steer a terminal."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return shown if len(text) <= limit else shown[:-3] + "..."

"""Checks of arguments. A constructor refuses a value; whoever knows the setting behind it says that name instead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from psp_lightning.utils.errors import UserError, suggest


class ArgumentError(UserError):
    """A value that an argument cannot have.

    Attributes:
        argument: its name.
        value: what was given.
        rule: what it has to be, the end of the sentence `argument=value ...`.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(argument, value, rule)
        self.argument, self.value, self.rule = argument, value, rule

    def __str__(self) -> str:
        return f"{self.argument}={self.value} {self.rule}"


def number(argument: str, value: Any, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Any:
    """Return `value`, a finite number from `low` to `high`, or None if it is `optional`.

    Raises:
        ArgumentError: it is something else.
    """
    return _checked(argument, value, low, high, optional, "number")


def whole(argument: str, value: Any, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Any:
    """Return `value`, a whole number from `low` to `high`, as an int (1e4 is one), or None if it is `optional`.

    Raises:
        ArgumentError: it is something else.
    """
    checked = _checked(argument, value, low, high, optional, "whole number")
    return None if checked is None else int(checked)


def _checked(argument: str, value: Any, low: float, high: float, optional: bool, what: str) -> Any:
    if value is None and optional:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (what == "whole number" and value != int(value)):
        limits = f", from {low:g} to {high:g}" if high < math.inf else f", at least {low:g}" if low > -math.inf else ""
        raise ArgumentError(argument, value, f"must be a {what}{limits}.")
    return value


def choice(argument: str, value: Any, options: Iterable[str]) -> Any:
    """Return `value`, one of `options`.

    Raises:
        ArgumentError: it is not; the closest option is suggested.
    """
    options = list(options)
    if value not in options:
        raise ArgumentError(
            argument, value, f"is unknown.{suggest(value, options)} Choose from: {', '.join(map(str, options))}"
        )
    return value

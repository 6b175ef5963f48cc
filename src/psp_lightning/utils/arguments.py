"""Checks of argument values.

A constructor raises `ArgumentError` about its own argument; `build.instantiate.naming` replaces the argument's name
with the setting that it came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from psp_lightning.utils.errors import UserError, suggest


class ArgumentError(UserError):
    """An argument with an invalid value.

    Attributes:
        argument: its name.
        value: the value that was passed.
        rule: the rest of the sentence `argument=value ...`, which says what is allowed.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(argument, value, rule)
        self.argument, self.value, self.rule = argument, value, rule

    def __str__(self) -> str:
        return f"{self.argument}={self.value} {self.rule}"


def number(argument: str, value: Any, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Any:
    """Return `value`, a finite number from `low` to `high`, or None if it is `optional`.

    Raises:
        ArgumentError: `value` is anything else.
    """
    return _checked(argument, value, low, high, optional, "number")


def whole(argument: str, value: Any, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Any:
    """Return `value`, a whole number from `low` to `high`, as an int (1e4 counts), or None if it is `optional`.

    Raises:
        ArgumentError: `value` is anything else.
    """
    checked = _checked(argument, value, low, high, optional, "whole number")
    return None if checked is None else int(checked)


def _checked(argument: str, value: Any, low: float, high: float, optional: bool, what: str) -> Any:
    if value is None and optional:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (what == "whole number" and value != int(value)):
        limits = f", from {low} to {high}" if high < math.inf else f", at least {low}" if low > -math.inf else ""
        raise ArgumentError(argument, value, f"must be a {what}{limits}.")
    return value


def choice(argument: str, value: Any, options: Iterable[str]) -> Any:
    """Return `value` if it is one of `options`.

    Raises:
        ArgumentError: it is not; the message suggests the closest option.
    """
    options = list(options)
    if value not in options:
        rule = f"is unknown.{suggest(value, options)} Choose from: {', '.join(map(str, options))}"
        raise ArgumentError(argument, value, rule)
    return value

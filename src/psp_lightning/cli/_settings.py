"""KEY=VALUE settings of the commands that need no configuration files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from psp_lightning.cli._main import guard
from psp_lightning.utils.errors import UserError, suggest


def parse(arguments: Sequence[str], defaults: Mapping[str, str], required: Sequence[str], usage: str) -> dict[str, str]:
    """The settings of a command line; later ones win.

    Args:
        defaults: value by name of all that may be left out.
        required: names of those that may not.
        usage: the command's form, for messages.

    Raises:
        UserError: an unknown or empty setting, or a missing one.
    """
    names = [*required, *defaults]
    values: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in names:
            raise UserError(f"'{argument}' is no setting.{suggest(key, names)} Settings: {', '.join(names)}. {usage}")
        if not value:
            raise UserError(f"{key}= has no value. {usage}")
        values[key] = value
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{missing[0]}=... must be given: {usage}")
    return {**defaults, **values}


def choice(values: Mapping[str, str], key: str, options: Sequence[str]) -> str:
    """The value of a setting that must be one of `options`.

    Raises:
        UserError: it is not.
    """
    if values[key] not in options:
        raise UserError(
            f"{key}={values[key]} is unknown.{suggest(values[key], options)} Choose from: {', '.join(options)}"
        )
    return values[key]


def new_file(values: Mapping[str, str], suffixes: Sequence[str]) -> Path:
    """The file `out`, of one of the suffixes, which must not be there unless overwrite=true.

    Raises:
        UserError: another suffix, or something is there.
    """
    path = Path(values["out"]).expanduser()
    if path.suffix not in suffixes:
        raise UserError(f"out={path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UserError(f"out={path} is a folder: give a file.")
    if path.exists() and choice(values, "overwrite", ("true", "false")) == "false":
        raise UserError(f"out={path} is there already: overwrite=true replaces it.")
    return path


def command(help: str, run: Callable[[list[str]], None]) -> None:
    """Run a command: without arguments its help and status 1, with --help its help, mistakes as one message."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help)
        sys.exit(0 if arguments else 1)
    guard(lambda: run(arguments))

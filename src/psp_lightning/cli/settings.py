"""Settings on a command line, KEY=VALUE: of commands with and without configuration files."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psp_lightning.cli.mistakes import guard
from psp_lightning.utils import arguments as checks
from psp_lightning.utils.errors import UserError, suggest

# settings whose values are paths or names: people write them as in a shell, without Hydra's own quotes
PATHS = (
    "ckpt", "input", "output", "init_from", "resume", "run", "generator.path", "paths.runs",
    "mix.reference", "mask.dir",
    "data.root", "data.source", "data.target", "data.val_root", "data.val_source", "data.val_target",
)  # fmt: skip


def verb(name: str, arguments: Sequence[str], verbs: Sequence[str]) -> str:
    """Return the first argument, one of the verbs of the command `name`.

    Raises:
        UserError: it is not.
    """
    if arguments[0] not in verbs:
        close = suggest(arguments[0], verbs)
        raise UserError(f"{name} has no '{arguments[0]}'.{close} It has: {', '.join(verbs)}.")
    return arguments[0]


def split(argument: str) -> tuple[str, str | None]:
    """Return key and value of `KEY=VALUE`; the value is None where there is no `=`."""
    key, sign, value = argument.partition("=")
    return key, value if sign else None


def parse(arguments: Sequence[str], defaults: Mapping[str, Any], required: Sequence[str], usage: str) -> dict[str, Any]:
    """Return the settings of a command line; later ones win.

    Args:
        arguments: `KEY=VALUE` each.
        defaults: value by name of everything that may be left out. Where it is an int or a bool, so is what is given.
        required: names of those that may not.
        usage: the command's form, for messages.

    Raises:
        UserError: an unknown or empty setting, a missing one, or a value of another kind.
    """
    names = [*required, *defaults]
    values = dict(defaults)
    for argument in arguments:
        key, value = split(argument)
        if value is None or key not in names:
            raise UserError(f"'{argument}' is no setting.{suggest(key, names)} Settings: {', '.join(names)}. {usage}")
        if not value:
            raise UserError(f"{key}= has no value. {usage}")
        values[key] = _as(type(defaults.get(key, "")), key, value)
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{missing[0]}=... must be given: {usage}")
    return values


def _as(kind: type, key: str, value: str) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{key}={value}: write {key}=true or {key}=false.")
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{key}={value} is not a whole number.") from None


def choice(values: Mapping[str, Any], key: str, options: Sequence[str]) -> str:
    """Return the value of a setting, which must be one of `options`; a `UserError` says what they are."""
    return checks.choice(key, values[key], options)


def new_file(values: Mapping[str, Any], suffixes: Sequence[str]) -> Path:
    """Return the file `out`, which has one of the suffixes and does not exist unless `overwrite`.

    Raises:
        UserError: another suffix, or something exists there.
    """
    path = Path(values["out"]).expanduser()
    if path.suffix not in suffixes:
        raise UserError(f"out={path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UserError(f"out={path} is a folder: give a file.")
    if path.exists() and not values["overwrite"]:
        raise UserError(f"out={path} is there already: overwrite=true replaces it.")
    return path


def command(help: str, run: Callable[[list[str]], object]) -> None:
    """Run a command: without arguments its help and status 1, with --help its help, mistakes as one message."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help)
        sys.exit(0 if arguments else 1)
    guard(lambda: run(arguments))


# --- Hydra's command lines


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra is to run one job for each combination of values."""
    return bool({"-m", "--multirun"} & set(arguments))


def flags(arguments: Sequence[str]) -> list[str]:
    """Return Hydra's own options with their values: everything that is no `key=value`, `+key`, `~key`."""
    found, takes_value = [], False
    for argument in arguments:
        is_flag = argument.startswith("-")
        if is_flag or (takes_value and "=" not in argument and not argument.startswith(("+", "~"))):
            found.append(argument)
        takes_value = is_flag and "=" not in argument
    return found


def quote(value: str) -> str:
    """Return a value in the quotes of Hydra's grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def quote_paths(arguments: list[str]) -> list[str]:
    """Quote values of `PATHS` that Hydra's grammar would not take as they are; not in a sweep."""
    if is_sweep(arguments):
        return arguments
    quoted = []
    for argument in arguments:
        key, value = split(argument)
        if value is not None and key in PATHS and not value.startswith(("'", '"', "[")):
            argument = argument if re.fullmatch(r"[\w./:~-]*", value, re.ASCII) else f"{key}={quote(value)}"
        quoted.append(argument)
    return quoted

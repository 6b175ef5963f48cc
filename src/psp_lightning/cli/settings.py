"""KEY=VALUE settings on the command lines of all commands, with and without configuration files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psp_lightning import __version__
from psp_lightning.cli.mistakes import guard
from psp_lightning.utils.errors import UserError, suggest

# Settings of Hydra's command lines that are paths or names. Their values are text, whatever Hydra's grammar makes of
# them: 2024_01_05 would be the number 20240105, and a comma the start of a sweep.
TEXT = {
    "run", "resume", "init_from", "paths.runs", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir",
    "ckpt", "input", "output", "doctor.output", "mask.dir", "mix.reference", "landmarks", "paste.parser", "outputs",
    "refinements", "targets", "name",
    "data.root", "data.source", "data.target", "data.val_root", "data.val_source", "data.val_target",
    "data.name", "data.licence", "domain.identity", "generator.path", "model.backbone",
    "task.datamodule.label_map", "task.datamodule.mask_dir",
    "loss.id.backbone", "loss.id.weights", "loss.lpips.weights", "loss.lpips_crop.weights", "loss.moco.weights",
    "loss.perceptual.weights",
    "callbacks.last.folder", "callbacks.best.dirpath", "callbacks.best.filename", "callbacks.every.folder",
    "callbacks.images.folder", "callbacks.curves.folder", "callbacks.export.run",
    "logger.csv.folder", "logger.tensorboard.save_dir", "logger.tensorboard.name", "logger.tensorboard.version",
    "logger.wandb.project", "logger.wandb.name", "logger.wandb.group", "logger.wandb.save_dir",
    # groups with one option, which may be the user's file
    "task", "domain", "data", "encoder", "refiner", "editability", "generator", "model", "network", "optimizer",
    "trainer", "callbacks", "paths", "experiment", "debug",
}  # fmt: skip


def verb(name: str, arguments: Sequence[str], verbs: Sequence[str]) -> str:
    """Return the first argument.

    Raises:
        UserError: it is not one of the verbs of the command `name`.
    """
    if arguments[0] not in verbs:
        close = suggest(arguments[0], verbs)
        raise UserError(f"{name} has no '{arguments[0]}'.{close} Choose from: {', '.join(verbs)}")
    return arguments[0]


def split(argument: str) -> tuple[str, str | None]:
    """Return key and value of `KEY=VALUE`; the value is None without a `=`."""
    key, sign, value = argument.partition("=")
    return key, value if sign else None


def parse(arguments: Sequence[str], defaults: Mapping[str, Any], required: Sequence[str], usage: str) -> dict[str, Any]:
    """Return the settings of a command line; later ones win.

    Args:
        arguments: items of the form `KEY=VALUE`.
        defaults: the optional settings. The type of a default, bool, int, float or str, is the type of the setting. A
            type instead of a value means that the default is None.
        required: names of the settings that must be given; they are text.
        usage: the command's usage line, for messages.

    Raises:
        UserError: a setting is unknown, empty, missing or of the wrong type.
    """
    names = [*required, *defaults]
    kinds = {name: value if isinstance(value, type) else type(value) for name, value in defaults.items()}
    values = {name: None if isinstance(value, type) else value for name, value in defaults.items()}
    for argument in arguments:
        key, value = split(argument)
        if value is None or key not in names:
            close = suggest(key, names)
            raise UserError(f"'{argument}' is not a setting.{close} Choose from: {', '.join(names)}. Usage: {usage}")
        if not value:
            raise UserError(f"{key}= has no value. Usage: {usage}")
        values[key] = _convert(kinds.get(key, str), key, value)
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{missing[0]}=... must be given. Usage: {usage}")
    return values


def _convert(kind: type, key: str, value: str) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{key}={value}: write {key}=true or {key}=false.")
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{key}={value} is not a {'whole ' if kind is int else ''}number.") from None


def new_file(values: Mapping[str, Any], suffixes: Sequence[str]) -> Path:
    """Return the path in the setting `out`.

    Raises:
        UserError: it has none of the suffixes, is a folder, or exists and `overwrite` is false.
    """
    path = Path(values["out"]).expanduser()
    if path.suffix not in suffixes:
        raise UserError(f"out={path} must end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UserError(f"out={path} is a folder. Give a file.")
    if path.exists() and not values["overwrite"]:
        raise UserError(f"out={path} exists already. overwrite=true replaces it.")
    return path


def command(help: str, run: Callable[[list[str]], object], needs_arguments: bool = True) -> None:
    """Run a command and report a mistake in one message.

    --help prints the help. If the command needs arguments, a call without any prints it, too, and exits with status 1.
    --version prints the version of this library.
    """
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(help.split()[0], __version__)
        return
    if {"-h", "--help"} & set(arguments) or (needs_arguments and not arguments):
        print(help)
        sys.exit(0 if arguments else 1)
    guard(lambda: run(arguments))


# --- Hydra's command lines

SWEEP = r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)"  # functions that give a sweep its values
VALUE = r"""(?:\A|,)\s*(('|").*?(?<!\\)\2(?=,|\Z)|[^,]*)"""  # group 1: a value of a sweep, with or without quotes
# Hydra's own options that take a value, which may be abbreviated
VALUED = (
    "--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
    "-c", "-p", "-cp", "-cn", "-cd", "-i",
)  # fmt: skip


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether Hydra will run one job for each combination of values."""
    return bool({"-m", "--multirun"} & set(arguments))


def separate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's own options with their values, and the settings: `key=value`, `+key=value` and `~key`."""
    options: list[str] = []
    settings: list[str] = []
    takes_value = False
    for argument in arguments:
        is_option = argument.startswith("-")
        (options if is_option or takes_value else settings).append(argument)
        takes_value = is_option and not takes_value and any(name.startswith(argument) for name in VALUED)
    return options, settings


def quote(value: str) -> str:
    """Return a value in the quotes of Hydra's grammar, where backslashes count only in front of a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + match[2].replace("'", "\\'"), value) + "'"


def plain(value: str) -> str:
    """Return the text of a setting in `TEXT`: without Hydra's quotes, if it has them, and with `~` expanded."""
    found = _read_by_hydra(value) if re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL) else value
    return os.path.expanduser(found if isinstance(found, str) else value)


def quote_text(arguments: Sequence[str]) -> list[str]:
    """Return a command line on which Hydra reads the values of `TEXT` as they were typed, with `~` expanded.

    Options such as `-m` come first, because Hydra rejects settings on both sides of an option. Only `null` keeps its
    meaning, and `${...}` is interpolated. In a sweep, commas outside quotes separate values, and Hydra's functions for
    sweeps, such as `choice(a,b)`, stay as they are.
    """
    changed, settings = separate(arguments)
    sweep = is_sweep(changed)
    for argument in settings:
        key, value = split(argument)
        if value and key.lstrip("+") in TEXT and not (sweep and re.fullmatch(SWEEP, value)):
            values = [match[1] for match in re.finditer(VALUE, value)] if sweep else [value]
            argument = f"{key}=" + ",".join(map(_as_text, values))
        changed.append(argument)
    return changed


def _as_text(value: str) -> str:
    text = plain(value)
    return text if value == "null" or _read_by_hydra(text) == text else quote(text)


def _read_by_hydra(value: str) -> Any:
    """Return what Hydra reads for a value, or None if it rejects the value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return None

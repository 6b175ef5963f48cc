"""Build objects from configuration nodes; the only caller of `hydra.utils.instantiate`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from psp_lightning.utils.arguments import ArgumentError
from psp_lightning.utils.errors import UserError, suggest

DERIVED = ("n_styles", "style_dim", "in_channels")  # arguments that are never settings
LISTS = ("loss", "metric")  # groups that select a list of options
PARTIAL = ("encoder", "refiner", "optimizer", "task.datamodule")  # nodes whose objects receive further arguments later


def instantiate(cfg: DictConfig, key: str, *settings: str, without: Sequence[str] = (), **kwargs: Any) -> Any:
    """Build the object of one node.

    Args:
        cfg: the composed configuration.
        key: key of the node, which contains `_target_` and its arguments.
        *settings: sections that the node's arguments refer to; see `naming`.
        without: keys of the node that are not arguments.
        **kwargs: additional arguments.

    Raises:
        UserError: `_target_` is missing, does not exist or rejects an argument. The message names the key.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(_no_target(*key.partition(".")[::2], node))
    if key in PARTIAL and not node.get("_partial_"):
        raise UserError(f"{key} needs `_partial_: true` beside its _target_: it receives more arguments later.")
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    for name in without:
        plain.pop(name, None)
    with naming(cfg, *settings, key, also=without):
        try:
            return hydra.utils.instantiate(plain, _convert_="all", **kwargs)
        except hydra.errors.InstantiationException as error:
            from pytorch_lightning.utilities.exceptions import MisconfigurationException

            cause = error.__cause__
            if missing := re.match(r"Error locating target '([^']*)'", str(error)):
                raise UserError(f"{key}: {_not_importable(missing[1], cause)}") from error
            if cause is None:
                raise UserError(f"{key}: {' '.join(str(error).split())}") from error
            if isinstance(cause, ImportError | AttributeError | LookupError | NameError):
                raise UserError(f"{key}: {_in_words(cause)}") from cause
            if isinstance(cause, MisconfigurationException):  # Lightning's equivalent of a ValueError
                raise ValueError(str(cause)) from cause
            raise cause from None


def _no_target(group: str, name: str, node: Any) -> str:
    """Return the message for a node without `_target_`."""
    key = f"{group}.{name}" if name else group
    if name and node is not None and not isinstance(node, DictConfig):
        return (
            f"{key}={node} stands directly below {group}. Its file must start with a name, and all settings must be "
            f"indented below it: NAME: {{_target_: MODULE.CLASS}}."
        )
    if group in LISTS:
        return f"{key} has no _target_: add _target_: MODULE.CLASS to its file. Otherwise, {not_selected(group, name)}"
    nodes: Any = node if isinstance(node, DictConfig) else {}
    for inner, value in nodes.items():
        if isinstance(value, DictConfig) and "_target_" in value:
            return f"{key} has no _target_, but {key}.{inner} has one: remove the line `{inner}:` and the indentation."
    return f"{key} has no _target_: choose an option of its group, e.g. {group}=NAME."


def not_selected(group: str, name: str) -> str:
    """Return the message for a setting of an option that is not in the list of its group."""
    return (
        f"{group}.{name} is set but '{name}' is not selected: add it to the list, {group}=[...,{name}] "
        f"(its file is {group}/{name}.yaml, in conf/ or in your --config-dir)."
    )


@contextlib.contextmanager
def naming(cfg: DictConfig, *sections: str, also: Sequence[str] = ()) -> Iterator[None]:
    """Replace arguments' names in errors with settings: `flip=2 must ...` becomes `data.flip=2 must ...`.

    Args:
        cfg: the composed configuration.
        *sections: keys of the mappings that the arguments come from; the first one with the argument is named.
        also: settings of the last section that are not arguments.

    Raises:
        UserError: the block raised an `ArgumentError`, a `ValueError` or a `TypeError`.
    """
    try:
        yield
    except ArgumentError as error:
        matches = (section for section in sections if error.argument in (OmegaConf.select(cfg, section) or ()))
        key = f"{next(matches, sections[-1])}.{error.argument}"
        raise UserError(f"{key}={error.value} {error.rule}") from None
    except ValueError as error:
        raise UserError(f"{sections[-1]}: {error}") from error
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        node = OmegaConf.select(cfg, sections[-1]) or DictConfig({})
        if not unknown or unknown[1] not in node:  # not from the configuration
            raise UserError(f"{sections[-1]}: {_in_words(error)}") from error
        known = [name for name in dict.fromkeys([*_arguments(node), *also]) if name != unknown[1]]
        close = suggest(unknown[1], known)
        raise UserError(
            f"there is no setting {sections[-1]}.{unknown[1]}.{close} Choose from: {', '.join(known)}"
        ) from error


def _arguments(node: DictConfig) -> list[str]:
    """Return the keys of a node and the arguments that its target takes."""
    names = dict.fromkeys(str(key) for key in node if key not in ("_target_", "_partial_"))
    with contextlib.suppress(Exception):  # a built-in target has no signature
        parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [name for name in names if name not in DERIVED]


def _in_words(error: Exception) -> str:
    """Return an exception as a message, which names the line if the exception came from the user's code."""
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
    others = (ours, os.path.join(os.path.dirname(os.path.abspath(os.__file__)), ""))  # and the standard library
    text = " ".join(str(error).split())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "site-packages" not in frame.filename and not os.path.abspath(frame.filename).startswith(others):
            return f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {text}"
    return text if isinstance(error, TypeError) else f"{type(error).__name__}: {text}"


def _not_importable(target: str, cause: BaseException | None) -> str:
    """Return the message for a `_target_` that cannot be imported."""
    module, _, name = target.rpartition(".")
    if not module:
        return f"_target_: {target} names no module. Write MODULE.CLASS."
    close = suggest(name, dir(sys.modules[module])) if module in sys.modules else ""
    reason = (cause and cause.__cause__) or cause
    return (
        f"cannot import {target} ({reason}).{close} The folder of your module must be in PYTHONPATH; plugins=[MODULE] "
        "imports modules that register classes."
    )


def import_plugins(names: Sequence[str]) -> None:
    """Import the user's modules, which register encoders, losses and tasks.

    Args:
        names: names of modules, as a list or as one text with commas.

    Raises:
        UserError: a module, or one that it imports, is not found.
    """
    for name in filter(None, names.split(",")) if isinstance(names, str) else names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: {_missing_module(name, error)}") from None


def _missing_module(name: str, error: ModuleNotFoundError) -> str:
    """Return the message for a plugin that cannot be imported."""
    parent, _, last = name.rpartition(".")
    if error.name and not f"{name}.".startswith(f"{error.name}."):
        return f"the module '{name}' imports '{error.name}', which is not installed."
    if parent in sys.modules and not hasattr(sys.modules[parent], "__path__"):  # a module, but no package
        meant = "the module's name has no .py" if last == "py" else "give the module only, not a class"
        return f"there is no module '{name}'. Write plugins=[{parent}]: {meant}."
    return f"there is no module '{name}' ({error}). Is its folder in PYTHONPATH?"

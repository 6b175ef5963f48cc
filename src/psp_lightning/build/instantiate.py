"""Build objects from configuration nodes; the only caller of `hydra.utils.instantiate`."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from psp_lightning.utils.arguments import ArgumentError
from psp_lightning.utils.errors import UserError, suggest

LISTS = ("loss", "metric")  # groups that select a list of options


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
        group, _, name = key.partition(".")
        if group in LISTS:
            raise UserError(not_selected(group, name))
        raise UserError(f"{key} has no _target_: choose an option of its group, e.g. {group}=NAME.")
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    for name in without:
        plain.pop(name, None)
    with naming(cfg, *settings, key):
        try:
            return hydra.utils.instantiate(plain, _convert_="all", **kwargs)
        except hydra.errors.InstantiationException as error:
            from pytorch_lightning.utilities.exceptions import MisconfigurationException

            cause = error.__cause__
            if cause is None or isinstance(cause, ImportError | AttributeError):  # the target does not exist
                raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
            if isinstance(cause, MisconfigurationException):  # Lightning's equivalent of a ValueError
                raise ValueError(str(cause)) from cause
            raise cause from None


def not_selected(group: str, name: str) -> str:
    """Return the message for a setting of an option that is not in the list of its group."""
    return (
        f"{group}.{name} is set but '{name}' is not selected: add it to the list, {group}=[...,{name}] "
        f"(its file is conf/{group}/{name}.yaml)."
    )


@contextlib.contextmanager
def naming(cfg: DictConfig, *sections: str) -> Iterator[None]:
    """Replace arguments' names in errors with settings: `flip=2 must ...` becomes `data.flip=2 must ...`.

    Args:
        cfg: the composed configuration.
        *sections: keys of the mappings that the arguments come from; the first one with the argument is named.

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
        if not (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
            raise UserError(f"{sections[-1]}: {error}") from error
        known = [str(key) for key in OmegaConf.select(cfg, sections[-1]) if key not in (unknown[1], "_target_")]
        close = suggest(unknown[1], known)
        raise UserError(
            f"there is no setting {sections[-1]}.{unknown[1]}.{close} Choose from: {', '.join(known)}"
        ) from error


def import_plugins(names: Sequence[str]) -> None:
    """Import the user's modules, which register encoders, losses and tasks.

    Raises:
        UserError: a module is not found.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: there is no module '{name}' ({error}). Is its folder in PYTHONPATH?") from None

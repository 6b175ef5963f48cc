"""Registries of networks by class name: a checkpoint contains class names and arguments, but no code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from psp_lightning.utils.compat import CLASSES
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.registry import register

ClassT = TypeVar("ClassT", bound=type[nn.Module])
InitT = TypeVar("InitT", bound=Callable[..., None])

ENCODERS: dict[str, type[nn.Module]] = {}
GENERATORS: dict[str, type[nn.Module]] = {}
EMBEDDINGS: dict[str, type[nn.Module]] = {}
REFINERS: dict[str, type[nn.Module]] = {}
TABLES = {"encoder": ENCODERS, "generator": GENERATORS, "embedding": EMBEDDINGS, "refiner": REFINERS}

LARGEST = 1 << 20  # the largest number allowed in a description of this library's networks


def register_encoder(cls: ClassT) -> ClassT:
    """Decorate an encoder class to make it loadable by name, see `protocols.Encoder`."""
    return register(ENCODERS, cls.__name__, cls)


def register_generator(cls: ClassT) -> ClassT:
    """Decorate a generator class to make it loadable by name, see `protocols.Generator`."""
    return register(GENERATORS, cls.__name__, cls)


def register_embedding(cls: ClassT) -> ClassT:
    """Decorate an embedding class to make it loadable by name, see `protocols.Embedding`."""
    return register(EMBEDDINGS, cls.__name__, cls)


def register_refiner(cls: ClassT) -> ClassT:
    """Decorate a refiner class to make it loadable by name, see `protocols.Refiner`."""
    return register(REFINERS, cls.__name__, cls)


def record_config(init: InitT) -> InitT:
    """Decorate a constructor to store its arguments, including defaults, as plain values in `self.config`.

    `cls(**config)` rebuilds the module. `self.config` is filled before the constructor runs, and the constructor may
    change it. If the constructor forwards `*args, **kwargs`, the decorated constructor of the base class adds those
    arguments.
    """
    signature = inspect.signature(init)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [name for name, kind in kinds.items() if kind not in collecting][1:]  # without self
    forwards = inspect.Parameter.VAR_KEYWORD in kinds.values()

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        given.apply_defaults()
        outer = self.__dict__.get("config", {})  # from the constructor of a derived class
        mine = {name: _plain(given.arguments[name]) for name in own}
        self.config = {**outer, **mine, **outer}
        init(self, *args, **kwargs)
        if not forwards:
            self.config = {name: value for name, value in self.config.items() if name in outer or name in mine}

    return recorded  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def check_registered(role: str, network: nn.Module) -> None:
    """Check before a training that its checkpoints can be loaded.

    Raises:
        UserError: the class is not registered, or its `config` is missing or contains more than plain values.
    """
    table, name = TABLES[role], type(network).__name__
    if table.get(name) is not type(network):
        other = f" (another class has this name: {table[name].__module__}.{name})" if name in table else ""
        raise UserError(
            f"The checkpoints of this training could not be loaded, because the {role} {name} is not registered{other}"
            f": decorate the class with register_{role}."
        )
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        raise UserError(
            f"The {role} {name} has no config, from which a checkpoint rebuilds it: decorate its __init__ with "
            "record_config of psp_lightning.models.registry."
        )
    for key, value in config.items():
        if not _is_plain(value):
            raise UserError(
                f"The {role} {name} has {key}={value!r}, which a checkpoint cannot contain: make it a number, a text, "
                "true, false, null or a list or dict of these."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def build_described(role: str, node: Any) -> Any:
    """Build a network from its description: call the class `node["class"]` with the other values.

    Args:
        role: `encoder`, `generator`, `embedding` or `refiner`, which selects the registry.
        node: the description, as plain values.

    Raises:
        UserError: the class is not registered, or does not accept the values.
    """
    table = TABLES[role]
    if not isinstance(node, Mapping) or not isinstance(node.get("class"), str):
        raise UserError(f"The network's description lacks its {role}.")
    arguments = dict(node)
    name = arguments.pop("class")
    name = name if name in table else CLASSES.get(name, name)
    if name not in table:
        raise UserError(
            f"Unknown {role} {name!r}.{suggest(name, table)} Known: {', '.join(sorted(table))}. A custom class must be "
            f"decorated with register_{role} and imported before its checkpoint is loaded; plugins=[MODULE] imports it "
            "in a command."
        )
    if table[name].__module__.startswith("psp_lightning."):  # custom classes may use any numbers
        _check_numbers(role, arguments)
    try:
        return table[name](**arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"The network's description does not fit its {role} {name}: {error}") from error


def _check_numbers(role: str, arguments: Mapping[str, Any]) -> None:
    """Reject counts that would keep a constructor busy forever."""
    for key, value in arguments.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not abs(number) <= LARGEST:
                raise UserError(f"The network's description does not fit its {role}: {key}={str(number)[:20]}.")

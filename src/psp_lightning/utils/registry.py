"""Tables of classes by name, which plug-ins add to."""

from __future__ import annotations

from typing import Any, TypeVar

from psp_lightning.utils.errors import UserError

ClassT = TypeVar("ClassT", bound=type)


def register(table: dict[str, Any], name: str, cls: ClassT) -> ClassT:
    """Put `cls` into `table` under `name`, and return it.

    A class that is defined again replaces its former self: its module was reloaded, or ran as a script and is imported.

    Raises:
        UserError: another class has the name.
    """
    held = table.get(name)
    if held is not None and not _is_same(held, cls):
        raise UserError(
            f"{name!r} is registered already, by {held.__module__}.{held.__qualname__}: register "
            f"{cls.__module__}.{cls.__qualname__} under another name."
        )
    table[name] = cls
    return cls


def _is_same(a: type, b: type) -> bool:
    modules = {a.__module__, b.__module__}
    return a.__qualname__ == b.__qualname__ and (len(modules) == 1 or "__main__" in modules)

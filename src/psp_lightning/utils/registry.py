"""Tables of classes by name, which plugins extend."""

from __future__ import annotations

from typing import Any, TypeVar

from psp_lightning.utils.errors import UserError

ClassT = TypeVar("ClassT", bound=type)


def register(table: dict[str, Any], name: str, cls: ClassT) -> ClassT:
    """Add `cls` to `table` under `name` and return it.

    A class that is defined again replaces the old class: its module was reloaded, or was run as a script and then
    imported.

    Raises:
        UserError: another class is registered under the name.
    """
    held = table.get(name)
    if held is not None:
        modules = {held.__module__, cls.__module__}
        if held.__qualname__ != cls.__qualname__ or (len(modules) > 1 and "__main__" not in modules):
            raise UserError(
                f"{name!r} is registered already, by {held.__module__}.{held.__qualname__}. Register "
                f"{cls.__module__}.{cls.__qualname__} under another name."
            )
    table[name] = cls
    return cls

"""File names as text that is the same in every locale."""

from __future__ import annotations

import os


def portable(name: str | os.PathLike[str]) -> str:
    """Return a name as UTF-8 decodes it; bytes that are not UTF-8 become lone surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def native(name: str) -> str:
    """Return the name that this process uses for `name`, a result of `portable`."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def is_utf8(name: str | os.PathLike[str]) -> bool:
    """Return whether the bytes of a name are UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in portable(name))

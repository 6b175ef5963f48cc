"""Find the weights that the library can use; nothing here downloads anything.

Public ones (`RECORDS`) are the user's to get, with `psp-weights get` or by hand: `find` returns the file, or says which
command gets it. Shipped ones (`shipped`) lie inside the package, with their records in a `records.json` beside them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from psp_lightning.utils.cache import cache_dir
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo.records import RECORDS as RECORDS
from psp_lightning.zoo.records import Record as Record


@dataclass(frozen=True)
class Shipped:
    """One file of weights inside the package.

    Attributes:
        name: `FOLDER/STEM`, as `toyfaces/generator`.
        file: where it lies.
        kind: `generator`, `psp` or `embedding`.
        sha256: digest, 64 hexadecimal digits.
        bytes: size.
        made_by: the command that made it.
        licence: terms of use.
    """

    name: str
    file: Path
    kind: str
    sha256: str
    bytes: int
    made_by: str
    licence: str


def weights_dir() -> Path:
    """Return the folder of public weights: `$PSP_WEIGHTS`, else `psp_lightning` in the user's cache folder."""
    if chosen := os.environ.get("PSP_WEIGHTS"):
        return Path(chosen).expanduser()
    return cache_dir()


def record(name: str) -> Record:
    """Return the record of the public weights `name`.

    Raises:
        UserError: for an unknown name, with the closest one.
    """
    if name not in RECORDS:
        raise UserError(f"No public weights are called {name!r}.{suggest(name, RECORDS)} Known: {', '.join(RECORDS)}.")
    return RECORDS[name]


def shipped_dir() -> Path:
    """Return the folder of the shipped weights in the package, in a wheel as in a source tree."""
    return Path(__file__).resolve().parents[1] / "weights"


def shipped() -> dict[str, Shipped]:
    """Return the records of the shipped weights by name, from every `records.json` below `shipped_dir()`.

    Raises:
        UserError: a damaged record.
    """
    found = {}
    for file in sorted(shipped_dir().glob("*/records.json")):
        try:
            for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
                found[name] = Shipped(name=name, **{**entry, "file": file.parent / entry["file"]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}): install psp-lightning again.") from None
    return found


def is_shipped_name(name: str) -> bool:
    """Whether `name` can only mean shipped weights: two parts, of which the first is a folder of them."""
    folder, _, stem = name.partition("/")
    return bool(stem) and "/" not in stem and folder in {known.partition("/")[0] for known in shipped()}


def find_shipped(name: str) -> Path:
    """Return the file of the shipped weights `name` after comparing it with its record.

    Raises:
        UserError: no such weights, with the names that exist; the file is missing or was changed.
    """
    known = shipped()
    if name not in known:
        options = ", ".join(known) or "none"
        raise UserError(
            f"There is no file or folder {name}, and no weights of this name in the package.{suggest(name, known)} "
            f"Shipped: {options}."
        )
    entry = known[name]
    if not entry.file.is_file():
        raise UserError(f"The shipped weights {name} are missing ({entry.file}): install psp-lightning again.")
    if (found := sha256(entry.file)) != entry.sha256:
        raise UserError(
            f"The shipped weights {name} ({entry.file}) were changed: SHA-256 {found[:16]}..., "
            f"expected {entry.sha256[:16]}... Install psp-lightning again."
        )
    return entry.file


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; it is remembered while size and time stay."""
    status = os.stat(path)
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, time: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def find(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Return the file with the weights `name`.

    Args:
        name: key of `RECORDS`, or the name of shipped weights.
        path: the user's own choice of a file; None looks in `weights_dir()`, for shipped weights in the package.

    Raises:
        UserError: when the file is missing; the message names it, its place and the command that gets it. A shipped
            file that was changed.
    """
    if path is None and is_shipped_name(name):
        return find_shipped(name)
    entry = record(name)
    folder = weights_dir()
    file = Path(path).expanduser() if path is not None else folder / entry.filename
    if file.is_file():
        return file
    what = "is a folder" if file.is_dir() else "does not exist"
    raise UserError(
        f"Weights {name!r} ({entry.filename}, needed by {entry.used_by}): {file} {what}.\n"
        f"Get it (licence: {entry.licence}) with\n"
        f"  psp-weights get {name}\n"
        f"or by hand with\n"
        f"  {entry.command(folder)}\n"
        f"or set PSP_WEIGHTS to the folder that holds {entry.filename}."
    )


def verify(name: str, path: str | os.PathLike[str]) -> None:
    """Compare the file's SHA-256 with the published digits, where there are any.

    Raises:
        UserError: when they differ (a broken download, or another file).
    """
    expected = record(name).sha256
    if expected is None:
        return
    found = sha256(path)
    if not found.startswith(expected):
        raise UserError(
            f"{path} is not the published file for {name!r}: SHA-256 {found[:16]}..., "
            f"expected {expected}... Delete it and download it again."
        )

"""Find public and shipped weights on disk, without downloading anything.

The user gets public weights (`RECORDS`) with `psp-weights get` or by hand: `find` returns the file, or raises an error
that shows the command. Shipped weights (`shipped`) are in the package, each folder with a `records.json`.
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
    """A file of weights in the package.

    Attributes:
        name: `FOLDER/STEM`, for example `toyfaces/generator`.
        kind: `generator`, `psp` or `embedding`.
        sha256: 64 hexadecimal digits.
        bytes: size of the file.
        made_by: the command that made it.
    """

    name: str
    file: Path
    kind: str
    sha256: str
    bytes: int
    made_by: str
    licence: str


def weights_dir() -> Path:
    """Return the folder of public weights: `$PSP_WEIGHTS`, or `psp_lightning` in the user's cache folder."""
    chosen = os.environ.get("PSP_WEIGHTS")
    return Path(chosen).expanduser() if chosen else cache_dir("PSP_WEIGHTS")


def record(name: str) -> Record:
    """Return the record of the public weights `name`; an unknown name is a UserError that suggests the closest one."""
    if name not in RECORDS:
        raise UserError(f"No public weights are called {name!r}.{suggest(name, RECORDS)} Known: {', '.join(RECORDS)}.")
    return RECORDS[name]


def shipped_dir() -> Path:
    """Return the folder of the shipped weights, in a wheel or a source tree."""
    return Path(__file__).resolve().parents[1] / "weights"


def shipped() -> dict[str, Shipped]:
    """Return the records of the shipped weights by name; raise a UserError if `records.json` is damaged."""
    found = {}
    for file in sorted(shipped_dir().glob("*/records.json")):
        try:
            for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
                found[name] = Shipped(name=name, **{**entry, "file": file.parent / entry["file"]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}). Reinstall psp-lightning.") from None
    return found


def is_shipped_name(name: str) -> bool:
    """Return whether `name` looks like shipped weights: two parts, the first of which is one of their folders."""
    folder, _, stem = name.partition("/")
    return bool(stem) and "/" not in stem and folder in {known.partition("/")[0] for known in shipped()}


def find_shipped(name: str) -> Path:
    """Return the file of the shipped weights `name` after checking its SHA-256.

    Raises:
        UserError: the name is unknown (the message lists the known ones), or the file is missing or was changed.
    """
    known = shipped()
    if name not in known:
        options = ", ".join(known) or "none"
        raise UserError(
            f"There is no file or folder {name}, and the package ships no weights of that name.{suggest(name, known)} "
            f"Shipped weights: {options}."
        )
    entry = known[name]
    if not entry.file.is_file():
        raise UserError(f"The shipped weights {name} are missing ({entry.file}). Reinstall psp-lightning.")
    if (found := sha256(entry.file)) != entry.sha256:
        raise UserError(
            f"The shipped weights {name} ({entry.file}) were changed: SHA-256 {found[:16]}..., "
            f"expected {entry.sha256[:16]}... Reinstall psp-lightning."
        )
    return entry.file


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, cached until its size or modification time changes."""
    status = os.stat(path)
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, size: int, time: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find(name: str, path: str | os.PathLike[str] | None = None) -> Path:
    """Return the file of the weights `name`.

    Args:
        name: a key of `RECORDS`, or the name of shipped weights.
        path: the user's own file. If None, public weights are looked for in `weights_dir()`, shipped ones in the
            package.

    Raises:
        UserError: the file is missing (the message says where it belongs and which command gets it), or a shipped file
            was changed.
    """
    if path is None and is_shipped_name(name):
        return find_shipped(name)
    entry = record(name)
    file = Path(path).expanduser() if path is not None else weights_dir() / entry.filename
    if file.is_file():
        return file
    what = "is a folder" if file.is_dir() else "does not exist"
    raise UserError(
        f"Weights {name!r} ({entry.filename}, needed by {entry.used_by}): {file} {what}.\n"
        f"Get it (licence: {entry.licence}) with\n"
        f"  psp-weights get {name}\n"
        f"or by hand with\n"
        f"  {entry.command(weights_dir())}\n"
        f"or set PSP_WEIGHTS to the folder that contains {entry.filename}."
    )


def download_hint(path: Path) -> str:
    """Return a sentence on how to get the public weights whose file or record is named like `path`, or ""."""
    for entry in RECORDS.values():
        if path.name in (entry.filename, entry.name):
            file = weights_dir() / entry.filename
            if file.is_file():
                return f" The weights folder has these weights: {file}"
            return f" Download it with `psp-weights get {entry.name}`, which prints where the file is."
    return ""


def verify(name: str, path: str | os.PathLike[str]) -> None:
    """Raise a UserError if digits of the SHA-256 are published and a file's SHA-256 differs from them."""
    expected = record(name).sha256
    if expected is not None and not (found := sha256(path)).startswith(expected):
        raise UserError(
            f"{path} is not the published file for {name!r}: SHA-256 {found[:16]}..., "
            f"expected {expected}... Delete it and download it again."
        )

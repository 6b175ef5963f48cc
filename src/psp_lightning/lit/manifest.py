"""manifest.jsonl, the record of an output folder: one JSON line per input, with its files and what made them.

Lines are appended while a prediction runs, so that an interrupted one can continue; later lines replace earlier ones.
The file is UTF-8. Bytes of a file name that are not UTF-8 are written as `\\udcXX`, which Python's `os.fsencode` turns
back into these bytes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.names import native, portable

MANIFEST = "manifest.jsonl"
NAMES = ("source", "name", "output", "files")  # the fields that contain names of files


def stamp(path: Path) -> list[int] | None:
    """Return the size and modification time of a file, which reveal a change of the file; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _converted(record: dict[str, Any], convert: Any) -> dict[str, Any]:
    """Return a record with `convert` applied to the names of files."""
    names = {key: record[key] for key in NAMES if key in record}
    return {**record, **{k: list(map(convert, v)) if isinstance(v, list) else convert(v) for k, v in names.items()}}


def _line(record: dict[str, Any]) -> bytes:
    fields = {key: value for key, value in _converted(record, portable).items() if key != "index"}
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return the records of an output folder; skip lines that this version of the library did not write.

    Raises:
        OSError: the manifest exists and cannot be read.
    """
    records = []
    try:
        lines = (folder / MANIFEST).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = _converted(json.loads(line), native)
            known = isinstance(record["files"], list) and isinstance(record["made"], dict)
            known = known and {"status", "stamp"} <= record.keys() and "\0" not in record["source"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # written by an older version, edited by hand, or cut off by a power failure
        if known:
            records.append(record)
    return records


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Append a line in one call, because threads and ranks append to the same file."""
    handle = os.open(folder / MANIFEST, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, _line(record))
    finally:
        os.close(handle)


def save_manifest(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the records in the order of the inputs, after the lines of other outputs in the folder."""
    own = {name for record in records for name in record["files"]}
    sources = {(record["source"], record.get("name")) for record in records}
    others = {}
    for record in read_manifest(folder):
        ended = record["status"] == "pending" and (record["source"], record.get("name")) in sources
        if own.isdisjoint(record["files"]) and not ended:
            others[tuple(record["files"])] = record
    kept = [record for files, record in others.items() if any(os.path.isfile(folder / name) for name in files)]
    with replacing(folder / MANIFEST) as part, part.open("wb") as file:
        file.writelines(map(_line, kept + sorted(records, key=lambda record: record["index"])))


def difference(recorded: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """Return in words how the record of a file differs from what would be written now; None if it does not differ."""
    if recorded is None:
        return f"has no record in {MANIFEST} of what made it"
    if os.path.realpath(recorded["source"]) != os.path.realpath(now["source"]):
        return f"was made from {recorded['source']}"
    before, after = recorded["made"], now["made"]
    if before.get("sha256") != after.get("sha256"):
        name = recorded.get("checkpoint")
        return f"was made by {'an earlier ' if name == now['checkpoint'] else 'another checkpoint, '}{name}"
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return None
    if groups := [key for key in changed if any(isinstance(made.get(key), dict) for made in (before, after))]:
        return f"was made with other settings of {' and '.join(groups)}"
    was, new = (" ".join(f"{key}={json.dumps(made.get(key))}" for key in changed) for made in (before, after))
    return f"was made with {was}, not {new}"

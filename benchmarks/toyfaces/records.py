"""Write the records of a folder of shipped weights: `python -m benchmarks.toyfaces.records FOLDER`.

Run it whenever a file of the folder has changed. It rewrites `records.json` from the headers of the files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psp_lightning.checkpoints.safetensors_io import read_described
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

LIMIT = 40 * 10**6  # bytes of all shipped weights in total


def write_records(
    folder: str | os.PathLike[str], made_by: Mapping[str, str] | None = None, licence: str | None = None
) -> dict[str, dict[str, Any]]:
    """Write `records.json` for the `*.safetensors` files of `folder`.

    Args:
        folder: for example `.../psp_lightning/weights/toyfaces`; its last part is the first part of the names.
        made_by: the command for each stem; default: `made_by` in the `origin` of the file.
        licence: licence of all files; default: `licence` in the `origin` of the file.

    Returns:
        The records: file, kind, sha256, bytes, made_by and licence for each name.

    Raises:
        UserError: there are no files, a file does not state its command or licence, the generator file of a pSp
            network is missing or has another digest, or the files exceed 40 MB.
    """
    folder, made_by = Path(folder).resolve(), made_by or {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} contains no .safetensors files.")
    records, wanted = {}, {}
    for file in files:
        description, _ = read_described(file)
        origin = description.get("origin") or {}
        entry = {
            "file": file.name,
            "kind": description["kind"],
            "sha256": locate.sha256(file),
            "bytes": file.stat().st_size,
            "made_by": made_by.get(file.stem) or origin.get("made_by"),
            "licence": licence or origin.get("licence"),
        }
        for key in ("made_by", "licence"):
            if not isinstance(entry[key], str):
                raise UserError(f"{file} does not state its {key}. Write it with origin={{'{key}': ...}} or give it.")
        records[f"{folder.name}/{file.stem}"] = entry
        network = description.get("psp") or {}
        if "file" in network.get("generator", {}):
            wanted[file] = network["generator"]
    for file, generator in wanted.items():
        name, digest = generator["file"], generator.get("sha256")
        if records.get(name, {}).get("sha256") != digest:
            raise UserError(
                f"{file} was made for a different {name} than the one in {folder}. Write it again, or delete it."
            )
    total = sum(entry["bytes"] for entry in records.values())
    if total > LIMIT:
        raise UserError(f"The files of {folder} have {total} bytes; the package may ship at most {LIMIT}.")
    with replacing(folder / "records.json") as part:
        part.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Write and print the records of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyfaces.records", description=__doc__)
    parser.add_argument("folder", help="folder of .safetensors files")
    parser.add_argument("--licence", help="licence of all files; default: the one that each file states")
    parser.add_argument(
        "--made-by",
        action="append",
        default=[],
        metavar="STEM=COMMAND",
        help="command of a file; repeatable",
    )
    given = parser.parse_args(arguments)
    commands = dict(item.split("=", 1) for item in given.made_by if "=" in item)
    try:
        records = write_records(given.folder, commands, given.licence)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, entry in records.items():
        print(f"{entry['bytes']:>10}  {entry['sha256'][:16]}  {name}")


if __name__ == "__main__":
    main()

"""Images of a folder, and pairs of a source and a target folder, matched by file stem."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from psp_lightning.utils.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def list_images(folder: str | os.PathLike[str], what: str = "image folder") -> list[Path]:
    """Return all images below `folder`, nested ones too, in the order of their relative paths, without hidden files.

    Raises:
        UserError: when the folder is missing, is a file, cannot be read or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"The {what} {folder} does not exist.")
    if not folder.is_dir():
        raise UserError(f"The {what} {folder} is a file; give a folder.")
    found, others = [], 0
    for base, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                found.append(Path(base, name))
            else:
                others += 1
    if not found:
        raise UserError(
            f"The {what} {folder} holds no images (it has {others} other files). Wanted: {', '.join(SUFFIXES)}; "
            "subfolders are searched."
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise UserError(f"Cannot read folder {error.filename}: {error.strerror}.")


def _by_key(paths: Sequence[Path], root: Path, nested: bool) -> dict[str, list[Path]]:
    groups = defaultdict(list)
    for path in paths:
        groups[path.relative_to(root).with_suffix("").as_posix() if nested else path.stem].append(path)
    return groups


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def pair(
    source: str | os.PathLike[str], target: str | os.PathLike[str], unpaired: str = "error"
) -> list[tuple[Path, Path]]:
    """Return pairs of source and target files in the order of the targets.

    Files belong together when their stems are equal, whatever their extensions and subfolders. Where a stem occurs
    more than once in a folder (`a/1.png`, `b/1.png`), the path below the folder, without its extension, counts instead.

    Args:
        unpaired: `error`, or `skip` to leave out files without a counterpart.

    Raises:
        UserError: for missing or empty folders, duplicate stems, and files without a counterpart: with their number
            and the first ones by name.
    """
    if unpaired not in ("error", "skip"):
        raise UserError(f"unpaired={unpaired!r} is unknown; use 'error' or 'skip'.")
    source, target = Path(source), Path(target)
    sources, targets = list_images(source, "source folder"), list_images(target, "target folder")
    left, right = _by_key(sources, source, False), _by_key(targets, target, False)
    if any(len(group) > 1 for group in [*left.values(), *right.values()]):
        left, right = _by_key(sources, source, True), _by_key(targets, target, True)
    for folder, groups in ((source, left), (target, right)):
        if double := [group for group in groups.values() if len(group) > 1]:
            raise UserError(
                f"{len(double)} duplicate stems in {folder}, the first: {_some([str(path) for path in double[0]])}. "
                "Files are paired by stem, so each may occur once; remove or rename the others."
            )
    lonely = [left[key][0].name for key in left if key not in right]
    lacking = [right[key][0].name for key in right if key not in left]
    pairs = [(left[key][0], group[0]) for key, group in right.items() if key in left]
    if (lonely or lacking) and (unpaired == "error" or not pairs):
        raise UserError(
            f"Sources in {source} ({len(left)} files) and targets in {target} ({len(right)} files) do not pair up."
            + (f" {len(lonely)} sources have no target: {_some(lonely)}." if lonely else "")
            + (f" {len(lacking)} targets have no source: {_some(lacking)}." if lacking else "")
            + " Files belong together when their names without extension are equal."
            + (f" To use the {len(pairs)} pairs that exist, set data.unpaired=skip." if pairs else "")
        )
    return pairs

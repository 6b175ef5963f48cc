"""Listing the images of a folder, and pairing source and target images by file stem."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from psp_lightning.utils.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def list_images(folder: str | os.PathLike[str], what: str = "image folder") -> list[Path]:
    """Return all images in `folder` and its subfolders, sorted by relative path. Hidden files and folders are skipped.

    Raises:
        UserError: if the folder is missing, is a file, cannot be read or contains no images.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"The {what} {folder} does not exist.")
    if not folder.is_dir():
        raise UserError(f"The {what} {folder} is a file. Give a folder.")
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
            f"The {what} {folder} and its subfolders contain no images (but {others} other files). "
            f"Known suffixes: {', '.join(SUFFIXES)}."
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise UserError(f"Cannot read folder {error.filename}: {error.strerror}.")


def _by_key(paths: Sequence[Path], root: Path, nested: bool) -> dict[str, list[Path]]:
    groups = defaultdict(list)
    for path in paths:
        groups[path.relative_to(root).with_suffix("").as_posix() if nested else path.stem].append(path)
    return groups


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def pair(
    source: str | os.PathLike[str], target: str | os.PathLike[str], unpaired: str = "error"
) -> list[tuple[Path, Path]]:
    """Return pairs of source and target files in the order of the targets.

    Files are paired by equal stems, regardless of extensions and subfolders. If a stem occurs more than once in a
    folder (`a/1.png`, `b/1.png`), files are paired by relative path without extension instead.

    Args:
        unpaired: `error`, or `skip` to omit files without a counterpart.

    Raises:
        UserError: if a folder is missing or empty, stems are duplicated, or files have no counterpart. The message
            counts these files and names the first ones.
    """
    if unpaired not in ("error", "skip"):
        raise UserError(f"unpaired={unpaired!r} is unknown. Use 'error' or 'skip'.")
    source, target = Path(source), Path(target)
    sources, targets = list_images(source, "source folder"), list_images(target, "target folder")
    left, right = _by_key(sources, source, False), _by_key(targets, target, False)
    if any(len(group) > 1 for group in [*left.values(), *right.values()]):
        left, right = _by_key(sources, source, True), _by_key(targets, target, True)
    for folder, groups in ((source, left), (target, right)):
        if duplicates := [group for group in groups.values() if len(group) > 1]:
            first = _first_few([str(path) for path in duplicates[0]])
            raise UserError(
                f"{len(duplicates)} duplicate stems in {folder}, the first: {first}. "
                "Files are paired by stem, so each stem may occur only once. Remove or rename the other files."
            )
    extra_sources = [left[key][0].name for key in left if key not in right]
    extra_targets = [right[key][0].name for key in right if key not in left]
    pairs = [(left[key][0], group[0]) for key, group in right.items() if key in left]
    if (extra_sources or extra_targets) and (unpaired == "error" or not pairs):
        raise UserError(
            f"Sources in {source} ({len(left)} files) and targets in {target} ({len(right)} files) do not pair up."
            + (f" {len(extra_sources)} sources have no target: {_first_few(extra_sources)}." if extra_sources else "")
            + (f" {len(extra_targets)} targets have no source: {_first_few(extra_targets)}." if extra_targets else "")
            + " A source and its target have the same name, apart from the extension."
            + (f" To use the {len(pairs)} pairs that exist, set data.unpaired=skip." if pairs else "")
        )
    return pairs

"""Listing the images of a folder, and pairing source and target images, or images and masks, by name."""

from __future__ import annotations

import functools
import glob
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from psp_lightning.utils.devices import is_first_rank
from psp_lightning.utils.errors import UserError, plural

Groups = dict[str, list[Path]]  # files by name

# Formats that Pillow registers but reads without pixels, on some systems only, or by running another program.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


def suffixes() -> tuple[str, ...]:
    """Return the file name suffixes of the images that Pillow can read here, including suffixes of imported plugins."""
    known = Image.registered_extensions().items()
    return tuple(suffix for suffix, name in known if name == "MPO" or (name in Image.OPEN and name not in NO_PICTURES))


def walk(root: Path) -> Iterator[tuple[Path, str, list[os.DirEntry[str]]]]:
    """Yield `root` and its subfolders: the path, the real path, and the entries that are not folders.

    Hidden files and folders are skipped. Links are followed, but each real folder is visited once, under its own path
    if that is below `root`. A link to a folder that contains the link is ignored.

    Raises:
        UserError: if a folder cannot be read.
    """
    seen: set[str] = set()
    pending = [root]
    links: list[Path] = []  # visited last, so that what they point to is named by its own path
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        files = []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"Cannot read folder {error.filename}: {error.strerror}.") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                files.append(entry)
            elif not entry.is_symlink():
                pending.append(folder / entry.name)
            elif Path(os.path.realpath(entry.path)) not in (Path(real), *Path(real).parents):
                links.append(folder / entry.name)
        yield folder, real, files


def _list(folder: str | os.PathLike[str], what: str) -> dict[Path, str]:
    """Return all images in `folder` and its subfolders, sorted by relative path, with the real path of each."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"The {what} {folder} does not exist.")
    if not folder.is_dir():
        raise UserError(f"The {what} {folder} is a file. Give a folder.")
    found, others, known = {}, Counter[str](), suffixes()
    for base, real, entries in walk(folder):
        for entry in entries:
            if entry.name.lower().endswith(known):
                here = os.path.join(real, entry.name)
                found[base / entry.name] = os.path.realpath(here) if entry.is_symlink() else here
            else:
                others[_kind(entry)] += 1
    if not found:
        raise UserError(
            f"The {what} {folder} and its subfolders contain no images"
            + (f", but {plural(others.total(), 'other file')} ({_counted(others)})." if others else ".")
            + " Images have a suffix that Pillow can read, such as .png, .jpg, .webp or .tif. Convert others."
        )
    _say_left_out(f"The {what} {folder}", others)
    return {path: found[path] for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix())}


def _kind(file: Path | os.DirEntry[str]) -> str:
    return Path(file.name).suffix.lower() or "without a suffix"


def _counted(others: Counter[str]) -> str:
    return ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5)) + (", ..." if len(others) > 5 else "")


def _say_left_out(where: str, others: Counter[str]) -> None:
    if others:
        _say_once(
            f"{where}: {plural(others.total(), 'file')} left out because Pillow reads no images with such a suffix "
            f"({_counted(others)})."
        )


@functools.lru_cache(maxsize=64)  # a folder may be listed for training and again for validation
def _say_once(message: str) -> None:
    if is_first_rank():
        logging.getLogger(__name__).warning(message)


def list_images(folder: str | os.PathLike[str], what: str = "image folder") -> list[Path]:
    """Return all images in `folder` and its subfolders, sorted by relative path. Hidden files and folders are skipped.

    Each file is returned once: links to a file or folder that is listed already, or that contains the link, are
    ignored. A log message counts the files that are left out because of their suffix.

    Raises:
        UserError: if the folder is missing, is a file, cannot be read or contains no images.
    """
    return once(_list(folder, what))


def once(real: dict[Path, str]) -> list[Path]:
    """Return each real file once, under its own path if that is among the keys, in the order of the keys."""
    if len(set(real.values())) == len(real):
        return list(real)
    chosen: dict[str, Path] = {}
    for path in sorted(real, key=Path.is_symlink):
        chosen.setdefault(real[path], path)
    return [path for path in real if chosen[real[path]] == path]


def expand(pattern: str) -> tuple[Path, list[Path]]:
    """Return the fixed part of a glob and the images that match it, sorted, each file once.

    `**` means any number of folders, each of which is visited once even if links form a loop. A log message counts the
    matches that are left out because of their suffix.
    """
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = [root]
    for part in parts[fixed:]:
        if part == "**":
            matches = [folder for match in matches if match.is_dir() for folder, *_ in walk(match)]
        else:
            matches = [
                Path(name) for match in matches for name in glob.glob(os.path.join(glob.escape(str(match)), part))
            ]
    if parts[-1] == "**":
        matches = [folder / entry.name for match in matches for folder, _, files in walk(match) for entry in files]
    known = suffixes()
    found = sorted({path for path in matches if path.is_file()})
    files = [path for path in found if path.name.lower().endswith(known)]
    _say_left_out(pattern, Counter(_kind(path) for path in found if not path.name.lower().endswith(known)))
    return root, once({path: os.path.realpath(path) for path in files})


def _groups(images: Iterable[Path], root: Path, nested: bool) -> Groups:
    groups: Groups = defaultdict(list)
    for path in images:
        groups[path.relative_to(root).with_suffix("").as_posix() if nested else path.stem].append(path)
    return groups


def _by_name(left: Iterable[Path], left_root: Path, right: Iterable[Path], right_root: Path) -> tuple[Groups, Groups]:
    """Return the files of both folders by the name that pairs them.

    The name is the stem; if a stem occurs more than once in a folder, it is the relative path without extension.
    """
    both = _groups(left, left_root, False), _groups(right, right_root, False)
    if any(len(group) > 1 for groups in both for group in groups.values()):
        both = _groups(left, left_root, True), _groups(right, right_root, True)
    return both


def _repeated(groups: Groups) -> list[list[Path]]:
    return [group for group in groups.values() if len(group) > 1]


def repeated(images: Iterable[Path], root: Path) -> list[list[Path]]:
    """Return the groups of images in `root` whose relative paths differ only in their extension."""
    return _repeated(_groups(images, root, True))


def _refuse_repeated(groups: list[list[Path]], folder: Path) -> None:
    if groups:
        raise UserError(
            f"{plural(len(groups), 'duplicate stem')} in {folder}, the first: "
            f"{_first_few([str(path) for path in groups[0]])}. "
            "Files are paired by stem, so each stem may occur only once. Remove or rename the other files."
        )


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True)
class Matching:
    """How the files of a source and a target folder pair up.

    Attributes:
        n_sources, n_targets: number of different names in each folder.
        pairs: (source, target) in the order of the targets; of several files with one name, the first.
        extra_sources, extra_targets: files without a counterpart.
        repeated_sources, repeated_targets: groups of files with the same name.
        shared_stems: groups of files in different subfolders with the same stem; if there are any, files are paired by
            relative path.
    """

    n_sources: int
    n_targets: int
    pairs: list[tuple[Path, Path]]
    extra_sources: list[Path]
    extra_targets: list[Path]
    repeated_sources: list[list[Path]]
    repeated_targets: list[list[Path]]
    shared_stems: list[list[Path]]


def match(source: str | os.PathLike[str], target: str | os.PathLike[str], what: str = "source") -> Matching:
    """Pair the files of two folders as `pair` does, but return what is wrong instead of raising an error.

    `what` is the noun for the files of `source` in messages.

    Raises:
        UserError: if a folder is missing, cannot be read or contains no images.
    """
    source, target = Path(source), Path(target)
    sources, targets = _list(source, f"{what} folder"), _list(target, "target folder")
    left, right = _by_name(sources, source, targets, target)
    # several names may be links to one file, for example one target of many sources, but no pair is repeated
    pairs = {(sources[left[key][0]], targets[group[0]]): (left[key][0], group[0])
             for key, group in right.items() if key in left}  # fmt: skip
    return Matching(
        len(left),
        len(right),
        list(pairs.values()),
        [group[0] for key, group in left.items() if key not in right],
        [group[0] for key, group in right.items() if key not in left],
        _repeated(left),
        _repeated(right),
        _repeated(_groups(sources, source, False)) + _repeated(_groups(targets, target, False)),
    )


def pair(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    unpaired: str = "error",
    what: str = "source",
    hint: str = "set data.unpaired=skip",
) -> list[tuple[Path, Path]]:
    """Return pairs of source and target files in the order of the targets.

    Files are paired by equal stems, regardless of extensions and subfolders. If a stem occurs more than once in a
    folder (`a/1.png`, `b/1.png`), files are paired by relative path without extension instead.

    Args:
        unpaired: `error`, or `skip` to omit files without a counterpart.
        what: noun for the files of `source` in messages.
        hint: how to omit files without a counterpart, for the message; empty if there is no way.

    Raises:
        UserError: if a folder is missing or empty, stems are duplicated, or files have no counterpart. The message
            counts these files and names the first ones.
    """
    found = match(source, target, what)
    refuse_unpaired(found, source, target, unpaired, what, hint)
    return found.pairs


def refuse_unpaired(
    found: Matching,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    unpaired: str = "error",
    what: str = "source",
    hint: str = "set data.unpaired=skip",
) -> None:
    """Raise the errors of `pair` about names that occur twice and about files without a counterpart."""
    if unpaired not in ("error", "skip"):
        raise UserError(f"unpaired={unpaired!r} is unknown. Use 'error' or 'skip'.")
    _refuse_repeated(found.repeated_sources, Path(source))
    _refuse_repeated(found.repeated_targets, Path(target))
    extra_sources = [path.name for path in found.extra_sources]
    extra_targets = [path.name for path in found.extra_targets]
    if (extra_sources or extra_targets) and (unpaired == "error" or not found.pairs):
        one = f"an {what}" if what[0] in "aeiou" else f"a {what}"
        parts = [
            f"{what.capitalize()}s in {source} ({plural(found.n_sources, 'file')}) and targets in {target} "
            f"({plural(found.n_targets, 'file')}) do not pair up."
        ]
        if extra_sources:
            parts.append(f"{plural(len(extra_sources), what)} without a target: {_first_few(extra_sources)}.")
        if extra_targets:
            parts.append(f"{plural(len(extra_targets), 'target')} without {one}: {_first_few(extra_targets)}.")
        parts.append(f"{one.capitalize()} and its target have the same name, apart from the extension.")
        if found.pairs and hint:
            parts.append(f"To use the other {plural(len(found.pairs), 'pair')}, {hint}.")
        raise UserError(" ".join(parts))


def pair_masks(images: Sequence[str], root: str | os.PathLike[str], masks: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the mask file of each image that has one. Images and masks are paired like sources and targets.

    Args:
        images: paths of all images, below `root`.
        masks: folder of the masks.

    Raises:
        UserError: if the folder is missing or empty, or stems are duplicated.
    """
    names = {Path(image): image for image in images}
    left, right = _by_name(names, Path(root), _list(masks, "mask folder"), Path(masks))
    _refuse_repeated(_repeated(left), Path(root))
    _refuse_repeated(_repeated(right), Path(masks))
    return {names[group[0]]: right[key][0] for key, group in left.items() if key in right}

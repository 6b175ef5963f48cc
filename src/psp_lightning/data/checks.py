"""Find what is wrong with the files of a training before it starts: the checks of psp-doctor that need no network.

Each check returns findings. A fault makes training fail or teaches something wrong; a warning may be intended.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from psp_lightning.data.labels import LabelMap
from psp_lightning.data.pairing import Matching, list_images, match, repeated
from psp_lightning.data.stores import FolderStore, PairLayout, Store
from psp_lightning.data.survey import Facts
from psp_lightning.utils.errors import plural

CHECKS = {
    "pairs": "sources or targets without a partner",
    "names": "names that occur twice",
    "broken": "broken or truncated files",
    "size": "pictures whose size or shape differs from the rest",
    "channels": "wrong channels or bit depth",
    "ids": "label ids or colours outside the label map",
    "lossy": "label maps that were saved with loss",
    "classes": "classes of the label map that never occur",
    "equal": "equal pixels under two names",
    "split": "pictures in both the training and the validation set",
    "faces": "faces that are missing or not aligned",
    "sketches": "sketches that are inverted or grey",
    "generator": "a generator that cannot draw the data",
    "average": "an average latent or value range that does not fit the generator",
}
SHOWN = 3  # files that a line names
ALIKE = 0.02  # relative difference below which two shapes are the same
# Two pictures count as the same if the correlation of their thumbnails is at least this. It is at most 0.95 for
# different drawn faces, and rarely below 0.98 for a face and its resized, compressed or brighter copy.
SAME = 0.98
MOSTLY = 0.5  # share of a sketch's pixels
CHUNK = 256  # rows of a product of thumbnails


@dataclass(frozen=True)
class Finding:
    """One fault or warning.

    Attributes:
        check: name in `CHECKS`, or `training` if the training does not even start.
        fault: False for a warning.
        text: what is wrong, without a full stop.
        advice: what to do, in whole sentences.
        files: all files that the finding is about, some with a note in brackets.
    """

    check: str
    fault: bool
    text: str
    advice: str
    files: tuple[str, ...] = ()

    def line(self) -> str:
        """Return one line that names the first files."""
        more = f", and {len(self.files) - SHOWN} more" if len(self.files) > SHOWN else ""
        named = f": {', '.join(self.files[:SHOWN])}{more}" if self.files else ""
        return f"{'fault' if self.fault else 'warning'}: {self.check}: {self.text}{named}. {self.advice}".rstrip()


# --- 1, 2: the folders


def check_store(store: Store, layout: PairLayout) -> list[Finding]:
    """Prepare a store like `Store.prepare`, but report files that do not pair up, and use those that do.

    Raises:
        UserError: a folder is not set, is missing or contains no images.
    """
    if not isinstance(store, FolderStore):
        store.prepare(layout)
        return []
    source, target = store.folders(layout)
    if source is None:
        files = list_images(target)
        store.use(target, [(None, path) for path in files])
        return check_names(files, target)
    found = match(source, target)
    store.use(target, list(found.pairs))
    return check_pairs(found, store.unpaired == "skip")


def check_pairs(found: Matching, skip: bool = False) -> list[Finding]:
    """Report files without a partner and names that occur twice.

    Args:
        found: how the folders pair up.
        skip: files without a partner are left out on purpose (`data.unpaired=skip`).
    """
    findings = []
    fault = not skip or not found.pairs
    advice = (
        "They are left out." if not fault
        else "A source and its target have the same name, apart from the extension. "
        + (f"Add the partners, or use the other {plural(len(found.pairs), 'pair')} with data.unpaired=skip."
           if found.pairs else "Rename the files.")
    )  # fmt: skip
    for noun, other, files in (
        ("source", "target", found.extra_sources),
        ("target", "source", found.extra_targets),
    ):
        if files:
            text = f"{plural(len(files), noun)} without a {other}"
            findings.append(Finding("pairs", fault, text, advice, tuple(map(str, files))))
    for noun, groups in (("source", found.repeated_sources), ("target", found.repeated_targets)):
        if groups:
            text = f"{plural(len(groups), 'name')} of {noun}s {'occurs' if len(groups) == 1 else 'occur'} twice"
            advice = "Files are paired by name without the extension. Remove or rename the others."
            findings.append(Finding("names", True, text, advice, _joined(groups)))
    if findings and fault and not (found.repeated_sources or found.repeated_targets) and found.shared_stems:
        text = f"{plural(len(found.shared_stems), 'stem')} in more than one subfolder"
        advice = "Files are therefore paired by their path below the folder. Give the partners the same subfolders."
        findings.append(Finding("names", True, text, advice, _joined(found.shared_stems)))
    return findings


def check_names(images: Iterable[Path], root: Path) -> list[Finding]:
    """Report images of one folder whose names differ only in their extension."""
    groups = repeated(images, root)
    if not groups:
        return []
    text = f"{plural(len(groups), 'name')} with several extensions"
    return [Finding("names", False, text, "If they show the same picture, remove one of them.", _joined(groups))]


def _joined(groups: Iterable[Iterable[Path | str]]) -> tuple[str, ...]:
    return tuple(" = ".join(map(str, group)) for group in groups)


# --- 3 to 5: each picture


def check_files(facts: Sequence[Facts], label_map: LabelMap | None = None, target_size: int = 0) -> list[Finding]:
    """Run the checks 3 to 10 and 12 on the facts of all pictures.

    Args:
        facts: the facts of all pictures in the training and the validation set.
        label_map: the classes, for label maps.
        target_size: height and width of the targets in training.
    """
    findings = check_pictures(facts, target_size)
    findings += check_lossy(facts) + check_equal(facts) + check_split(facts) + check_sketches(facts)
    if label_map is not None:
        findings += check_classes(facts, label_map)
    return sorted(findings, key=lambda finding: list(CHECKS).index(finding.check))


def check_pictures(facts: Sequence[Facts], target_size: int = 0) -> list[Finding]:
    """Run the checks 3 to 6, which make sense even for a few pictures."""
    return check_broken(facts) + check_sizes(facts, target_size) + check_channels(facts) + check_ids(facts)


def check_broken(facts: Iterable[Facts]) -> list[Finding]:
    """Report files that cannot be decoded."""
    return [
        _finding("broken", True, group, "cannot be read", "Replace or remove them.", lambda item: item.broken)
        for group in _by_role(item for item in facts if item.broken)
    ]


def check_sizes(facts: Iterable[Facts], target_size: int = 0) -> list[Finding]:
    """Report pictures of another shape or size than the rest, and pictures that are too small."""
    findings = []
    for group in _by_role(item for item in facts if min(item.size) > 0 and item.kind != "mask"):
        (width, height), count = Counter(item.size for item in group).most_common(1)[0]
        usual = f"{width} x {height}"
        alike = [item for item in group if _alike(item.size, (width, height))]
        others = [item for item in group if not _alike(item.size, (width, height))]
        squashed = "Training squashes every picture to a square. Crop them"
        if len(others) > len(alike):
            findings.append(_finding("size", False, group, "have many shapes", f"{squashed}.", _size))
            continue
        if others:
            text = f"have another shape than the rest ({usual})"
            findings.append(_finding("size", True, others, text, f"{squashed} like the rest, or remove them.", _size))
        if not _alike((width, height), (1, 1)):
            findings.append(_finding("size", False, alike, "are not square", f"{squashed}.", _size))
        odd = [item for item in alike if item.size != (width, height)]
        if odd and count > len(group) / 2:
            text = f"have another size than the rest ({usual})"
            findings.append(_finding("size", False, odd, text, "They are resized, so check their quality.", _size))
        small = [item for item in alike if min(item.size) < target_size and item.role != "source"]
        if small:
            text = f"are smaller than the {target_size} px of training"
            advice = "They are enlarged and look blurred. Use larger ones, or a smaller domain.target_size."
            findings.append(_finding("size", False, small, text, advice, _size))
    return findings


def _alike(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return abs(math.log(a[0] * b[1] / (a[1] * b[0]))) <= ALIKE


def _size(item: Facts) -> str:
    return f"{item.size[0]} x {item.size[1]}"


def check_channels(facts: Iterable[Facts]) -> list[Finding]:
    """Report unusable pixels, and pictures with other channels or another depth than the rest."""
    findings = []
    for group in _by_role(item for item in facts if not item.broken and item.kind != "labels"):
        if unusable := [item for item in group if item.unusable]:
            advice = "Save them with 8 bits per channel."
            findings.append(_finding("channels", True, unusable, "cannot be used", advice, _reason))
        good = [item for item in group if not item.unusable]
        if coloured := [item for item in good if item.coloured]:
            advice = "A sketch is black on white. Are these the photographs?"
            findings.append(_finding("channels", True, coloured, "have colours", advice))
        if not good or group[0].kind != "image":
            continue
        depths = Counter(item.depth for item in good)
        usual = depths.most_common(1)[0][0]
        for depth in depths:
            same = [item for item in good if item.depth == depth]
            if depth != usual:
                advice = f"The rest is {usual}. Save them in the same way, or remove them."
                findings.append(_finding("channels", True, same, f"are {depth}", advice))
            elif depth != "colour":
                advice = "They become 8-bit RGB: grey is repeated, transparency is replaced by white."
                findings.append(_finding("channels", False, same, f"are {depth}", advice))
    return findings


def _reason(item: Facts) -> str:
    return (
        item.unusable.removeprefix(item.name).removeprefix(f"Mask {item.name}").lstrip(": ").split(". ")[0].rstrip(".")
    )


# --- 6 to 8: label maps


def check_ids(facts: Iterable[Facts]) -> list[Finding]:
    """Report label maps with ids or colours that the label map does not list."""
    labels = [item for item in facts if item.kind == "labels"]
    findings = []
    advice = "Use the label map that they were made with: task.datamodule.label_map=FILE, with such ids under 'ignore'."
    for group in _by_role(item for item in labels if item.unusable):
        findings.append(_finding("ids", True, group, "cannot be read as ids", advice, _reason))
    for group in _by_role(item for item in labels if item.outside):
        findings.append(_finding("ids", True, group, "have ids outside the label map", advice, _ids))
    return findings


def _ids(item: Facts) -> str:
    ids = list(item.outside)
    more = ", ..." if len(ids) > SHOWN else ""
    return f"{'id' if len(ids) == 1 else 'ids'} {', '.join(map(str, ids[:SHOWN]))}{more}"


def check_lossy(facts: Iterable[Facts]) -> list[Finding]:
    """Report label maps in a lossy format, and label maps with traces of compression or interpolation."""
    advice = "Save label maps as PNG, from the original ids, and resize them by nearest neighbour."
    return [
        _finding("lossy", True, group, "were saved with loss", advice, lambda item: item.lossy)
        for group in _by_role(item for item in facts if item.lossy)
    ]


def check_classes(facts: Iterable[Facts], label_map: LabelMap) -> list[Finding]:
    """Report classes that no label map of the training set contains."""
    counts = [item.pixels for item in facts if item.pixels is not None and item.part == "train"]
    if not counts:
        return []
    absent = [i for i, n in enumerate(np.sum(counts, axis=0)) if n == 0]
    if not absent:
        return []
    names = tuple(f"{label_map.ids[i]} {label_map.names[i]}" for i in absent)
    occur = "occurs" if len(absent) == 1 else "occur"
    text = f"{plural(len(absent), 'class')} {occur} in none of {plural(len(counts), 'label map')} for training"
    return [Finding("classes", False, text, "The network cannot learn them. Are these the right ids?", names)]


# --- 9, 10: the same picture twice


def check_equal(facts: Iterable[Facts]) -> list[Finding]:
    """Report pictures with exactly the same pixels."""
    findings = []
    for group in _by_role(item for item in facts if item.digest and item.kind != "mask"):
        same: defaultdict[bytes, dict[str, None]] = defaultdict(dict)
        for item in group:
            same[item.digest][item.name] = None
        if groups := [sorted(names) for names in same.values() if len(names) > 1]:
            text = f"{plural(len(groups), _noun(group[0]))} under more than one name"
            advice = "They count several times in training. Remove the copies."
            findings.append(Finding("equal", False, text, advice, _joined(groups)))
    return findings


def check_split(facts: Iterable[Facts]) -> list[Finding]:
    """Report validation images that the training set contains, too, even if resized, compressed or mirrored.

    Two images count as the same if the correlation of their thumbnails is at least `SAME`.
    """
    images = [item for item in facts if item.thumb is not None and item.role in ("image", "target")]
    train, val = ([item for item in images if item.part == part] for part in ("train", "val"))
    if not train or not val:
        return []
    known = _normalised(train)
    found: list[tuple[str, str]] = []
    for start in range(0, len(val), CHUNK):
        chunk = val[start : start + CHUNK]
        best = np.stack([_normalised(chunk, mirror) @ known.T for mirror in (False, True)]).max(0)
        found += [(item.name, train[int(row.argmax())].name)
                  for item, row in zip(chunk, best, strict=True) if row.max() >= SAME]  # fmt: skip
    if not found:
        return []
    text = f"{plural(len(found), 'validation image')} in the training set as well, perhaps changed a little"
    advice = "The validation would look too good. Remove them, or give a validation set with data.val_root=DIR."
    return [Finding("split", True, text, advice, _joined(found))]


def _normalised(items: Sequence[Facts], mirror: bool = False) -> np.ndarray:
    """Return the thumbnails as float32 (N, D) with mean 0 and length 1, or 0 if they have one colour."""
    thumbs = np.stack([item.thumb for item in items]).astype(np.float32)  # type: ignore[misc]
    flat = (thumbs[:, :, ::-1] if mirror else thumbs).reshape(len(items), -1)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > len(flat[0]) ** 0.5, flat / np.maximum(length, 1), 0)  # less than one level is noise


# --- 12: sketches


def check_sketches(facts: Iterable[Facts]) -> list[Finding]:
    """Report sketches that are white on black, and pictures in shades of grey instead of sketches."""
    sketches = [item for item in facts if item.kind == "sketch" and item.digest and not item.coloured]
    findings = []
    if inverted := [item for item in sketches if item.tones[0] > MOSTLY]:
        advice = "Sketches are black on white. Invert these."
        findings.append(_finding("sketches", True, inverted, "are white on black", advice))
    if grey := [item for item in sketches if item.tones[1] > MOSTLY]:
        advice = "Sketches are black on white, but more than half of their pixels are grey."
        findings.append(_finding("sketches", True, grey, "are grey", advice))
    return findings


# --- words


def _by_role(facts: Iterable[Facts]) -> list[list[Facts]]:
    groups = defaultdict(list)
    for item in facts:
        groups[item.role].append(item)
    return list(groups.values())


def _noun(item: Facts) -> str:
    return {"labels": "label map", "sketch": "sketch"}.get(item.kind, item.role)


def _finding(
    check: str,
    fault: bool,
    group: Sequence[Facts],
    predicate: str,
    advice: str,
    note: Callable[[Facts], str] = lambda item: "",
) -> Finding:
    """Make a finding about pictures of one role: "2 targets are grey: a.png (NOTE), b.png (NOTE)"."""
    if len(group) == 1:
        verb, _, rest = predicate.partition(" ")
        predicate = f"{ ({'are': 'is', 'have': 'has', 'were': 'was'}.get(verb, verb)) } {rest}"
    files = tuple(item.name + (f" ({text})" if (text := note(item)) else "") for item in group)
    return Finding(check, fault, f"{plural(len(group), _noun(group[0]))} {predicate}", advice, files)

"""The checks of psp-doctor on the files of a configuration, and the pictures that show what the network gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import IterableDataset

from psp_lightning.data.checks import Finding, check_files, check_names, check_pairs, check_pictures, check_store
from psp_lightning.data.datamodules import TaskDataModule
from psp_lightning.data.datasets import TaskDataset
from psp_lightning.data.face_check import FFHQ_CROP, OWN_CROP, check_faces, eye_offset
from psp_lightning.data.labels import LabelMap
from psp_lightning.data.loader import EpochSampler
from psp_lightning.data.sources import Labels
from psp_lightning.data.spec import source_to_rgb
from psp_lightning.data.stores import FolderStore
from psp_lightning.data.survey import Facts, Picture, is_drawn, pictures, survey
from psp_lightning.utils.arguments import number, whole
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import to_pil
from psp_lightning.utils.pictures import open_8bit
from psp_lightning.utils.progress import track

EDGE = 128  # smallest height and width of a picture in a sheet, in pixels
LINE = 16  # height of a line of text


@dataclass
class Files:
    """What was found in the files of a training.

    Attributes:
        findings: the findings of checks 1 to 10 and 12.
        pictures, facts: every picture, and what is known about it.
    """

    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether every sample can be loaded."""
        fatal = ("pairs", "names", "broken", "ids", "lossy")
        return not any(item.fault and item.check in fatal for item in self.findings) and not any(
            item.unusable for item in self.facts
        )


def read_files(data: Any, workers: int, progress: bool) -> Files:
    """Check the files of the training and the validation set.

    Args:
        data: the data module.
        workers: threads that read files.
        progress: show a progress bar.

    Raises:
        UserError: a folder is missing, or not set.
    """
    files = Files()
    for part in filter(data.has_store, ("train", "val")):
        store = data.store(part)
        found = check_store(store, data.layout)
        masks = None
        if not any(item.fault for item in found):
            try:
                masks = data.dataset(part).masks
            except UserError as error:
                found.append(Finding("pairs", True, str(error).rstrip("."), ""))
        files.findings += [item for item in found if item not in files.findings]  # both parts may be in one folder
        files.pictures += pictures(store, data.spec, part, masks)
    label_map = classes(data)
    files.facts = survey(files.pictures, label_map, workers, progress)
    files.findings += check_files(files.facts, label_map, data.target_size)
    return files


def classes(data: Any) -> LabelMap | None:
    """Return the label map, if the sources are label maps."""
    return data.spec.source.classes if isinstance(data.spec.source, Labels) else None


def check_first_batch(data: TaskDataModule) -> list[Finding]:
    """Run the checks 1 to 6 on the files of the first training batch, which takes less than a second."""
    dataset = data.dataset("train") if data.has_store("train") else None
    if not isinstance(dataset, TaskDataset):
        return []
    store, findings = dataset.store, []
    if is_drawn(store):
        return []
    if isinstance(store, FolderStore):
        if store.matching is None:
            folder, paths = store.listing()
            findings += check_names(map(Path, paths), folder)
        else:
            findings += check_pairs(store.matching, skip=True)
    first = EpochSampler(len(dataset), data.seed).order(0)[: data.batch_size]
    batch = pictures(store, data.spec, "train", dataset.masks, map(int, first))
    return findings + check_pictures(survey(batch, classes(data)), data.target_size)


def check_options(cfg: DictConfig) -> None:
    """Check the settings of psp-doctor itself.

    Raises:
        UserError: a number is out of range.
    """
    for name, low in (("workers", 1), ("images", 0), ("faces", 0), ("steps", 1)):
        cfg.doctor[name] = whole(f"doctor.{name}", cfg.doctor[name], low)
    number("doctor.minutes", cfg.doctor.minutes, 0)


def uses_id(cfg: DictConfig) -> bool:
    """Return whether the id loss has a weight."""
    node = OmegaConf.select(cfg, "loss.id")
    return bool(node) and node.get("weight", 1) > 0


def look_for_faces(cfg: DictConfig, files: Files) -> list[Finding]:
    """Search some targets, evenly spaced, for aligned faces.

    The identity networks of the paper look at the face in FFHQ's crop. Other embeddings see the whole image and may
    have learned from faces in another place, so for them only a far larger distance is a fault.

    Raises:
        UserError: the face detector is not installed.
    """
    readable = {item.name for item in files.facts if item.thumb is not None}
    images = [item for item in files.pictures if item.role in ("image", "target") and item.name in readable]
    places = np.unique(np.linspace(0, len(images) - 1, min(cfg.doctor.faces, len(images))).round().astype(int))
    offsets = [
        eye_offset(open_8bit(images[i].load(), "RGB"))
        for i in track(places, "looking for faces", len(places), cfg.doctor.progress_bar)
    ]
    return check_faces(offsets, OWN_CROP if "/" in str(cfg.loss.id.get("backbone")) else FFHQ_CROP)


def first_samples(data: Any, n: int) -> list[dict[str, Any]]:
    """Return the first `n` training samples of the first epoch, as the network gets them; none without images."""
    if not data.has_images("train"):
        return []
    dataset = data.dataset("train")
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, n))
    order = EpochSampler(len(dataset), data.seed).order(0)[:n]
    return [dataset[(0, int(index))] for index in order]


def pairs_sheet(samples: Sequence[dict[str, Any]], data: Any) -> Image.Image:
    """Draw one row for each sample: source and target after all transforms, above the target's file."""
    size = samples[0]["target"].shape[-2:]
    sources = torch.cat([source_to_rgb(sample["source"][None], data.spec) for sample in samples])
    shown = F.interpolate(sources, size=size, mode="nearest")
    rows = [[source, sample["target"]] for source, sample in zip(shown, samples, strict=True)]
    return sheet(("source", "target"), rows, [sample["path"] for sample in samples])


def sheet(columns: Sequence[str], rows: Sequence[Sequence[Tensor]], captions: Sequence[str]) -> Image.Image:
    """Draw rows of pictures (3, S, S) in [-1, 1] below the names of the columns, each above its caption."""
    edge = max(EDGE, rows[0][0].shape[-1])
    width = edge * len(columns)
    drawn = Image.new("RGB", (width, LINE + len(rows) * (edge + LINE)), "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(0.7 * LINE)
    for k, name in enumerate(columns):
        draw.text((k * edge + 2, 0), name, fill="black", font=font)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = LINE + i * (edge + LINE)
        for k, picture in enumerate(row):
            drawn.paste(to_pil(picture).resize((edge, edge), Image.Resampling.NEAREST), (k * edge, top))
        while font.getlength(caption) > width - 4:  # the end of a path is the most telling part
            caption = caption[1:]
        draw.text((2, top + edge), caption, fill="black", font=font)
    return drawn


def histogram(facts: Iterable[Facts], label_map: LabelMap) -> list[str]:
    """Return one line for each class: id, name, share of all pixels, and number of label maps with the class."""
    counts = np.array([item.pixels for item in facts if item.pixels is not None])
    if not len(counts):
        return []
    shares, maps = counts.sum(0) / max(1, counts.sum()), (counts > 0).sum(0)
    width = max(map(len, label_map.names))
    return [
        f"{i:>5} {name:<{width}} {share:7.2%}  in {n} of {len(counts)}  {'#' * round(40 * share)}".rstrip()
        for i, name, share, n in zip(label_map.ids, label_map.names, shares, maps, strict=True)
    ]

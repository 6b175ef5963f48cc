"""The inputs of a prediction: images of a file, folder or glob, or latent codes, each with its output's name."""

from __future__ import annotations

import glob
import itertools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from psp_lightning.data.pairing import SUFFIXES, list_images
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.data.transforms import rgb
from psp_lightning.utils.errors import UserError


@dataclass(frozen=True)
class InputFile:
    """One image, or one code of a file of latents, to predict from.

    Args:
        path: the file.
        name: folder and stem of its outputs, relative to the output folder, without a suffix.
    """

    path: Path
    name: str


def list_inputs(pattern: str, exclude: Path | None = None) -> list[InputFile]:
    """The images that `pattern` means, sorted.

    Args:
        pattern: a file, a folder (searched recursively), or a glob (`**` for any depth).
        exclude: a folder whose files are no inputs: the output folder, when it lies inside the input folder.

    Returns:
        Files with unique names: the tree below the folder (for a glob, below its fixed part) is mirrored; where two
        files differ by their suffix alone, the suffix becomes part of the name.

    Raises:
        UserError: nothing there, or nothing that is an image.
    """
    path = Path(pattern)
    if path.is_file():
        return [InputFile(path, path.stem)]
    if path.is_dir():
        root, files = path, list_images(path, "input folder")
    elif glob.has_magic(pattern):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root, found = Path(*fixed), sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        files = [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]
    else:
        raise UserError(f"input={pattern}: there is no such file or folder.")
    if exclude is not None and exclude.resolve() == root.resolve():
        raise UserError(f"output={exclude} is the folder of the inputs: give another one.")
    if exclude is not None:
        files = [file for file in files if exclude.resolve() not in file.resolve().parents]
    if not files:
        raise UserError(f"input={pattern}: no image there. Known suffixes: {', '.join(SUFFIXES)}.")
    relative = [file.relative_to(root) for file in files]
    count = Counter(file.with_suffix("") for file in relative)
    names: dict[str, None] = {}  # ordered
    for file in relative:
        name = (file.with_suffix("") if count[file.with_suffix("")] == 1 else file).as_posix()
        free = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
        names[next(candidate for candidate in free if candidate not in names)] = None
    return [InputFile(file, name) for file, name in zip(files, names, strict=True)]


class InputDataset(Dataset[dict[str, Any]]):
    """Reads inputs; what cannot be read becomes an item with `error` instead of an exception.

    Items hold `index` and `seconds` (spent on reading) and either `source` (spec.channels, size, size) or `error`.
    `known` (3, size, size) and `hole` (1, size, size) come with inpainting, for compositing.

    Args:
        files: the inputs.
        spec: what the network takes.
        factor: superres: degrade by this factor first.
        masks: inpainting: mask file by stem; None: what `load_source` does without a mask.
        seed: of holes that are drawn; each file gets its own, whatever the batch size or the number of devices.
    """

    def __init__(
        self,
        files: list[InputFile],
        spec: InputSpec,
        factor: int | None = None,
        masks: dict[str, Path] | None = None,
        seed: int = 0,
    ) -> None:
        self.files, self.spec, self.factor, self.masks, self.seed = files, spec, factor, masks, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = time.perf_counter()
        file = self.files[index]
        item: dict[str, Any] = {"index": index}
        try:
            masked = self.spec.kind == "masked"
            rng = np.random.default_rng([self.seed, index]) if masked else None
            mask = self._mask(file) if masked else None
            item["source"] = load_source(file.path, self.spec, rng=rng, factor=self.factor, mask=mask)
            if masked:
                item["known"] = rgb(file.path, self.spec.size)
        except UserError as error:
            item["error"] = str(error)
        return {**item, "seconds": time.perf_counter() - start}

    def _mask(self, file: InputFile) -> Path | None:
        if self.masks is None:
            return None
        if file.path.stem not in self.masks:
            raise UserError(f"{file.path}: mask.dir has no mask named {file.path.stem}.*")
        return self.masks[file.path.stem]


class LatentDataset(Dataset[dict[str, Any]]):
    """Items hold `index`, `seconds` and `latents`, one code.

    Args:
        codes: (N, z_dim), (N, style_dim) or (N, n_styles, style_dim) float32.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "seconds": 0.0, "latents": self.codes[index]}


def collate_inputs(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what was read; `failed` lists (index, error, seconds) of the rest."""
    good = [item for item in items if "error" not in item]
    batch: dict[str, Any] = {
        "index": [item["index"] for item in good],
        "seconds": [item["seconds"] for item in good],
        "failed": [(item["index"], item["error"], item["seconds"]) for item in items if "error" in item],
    }
    for key in ("source", "known", "latents"):
        if good and key in good[0]:
            batch[key] = torch.stack([item[key] for item in good])
    return batch

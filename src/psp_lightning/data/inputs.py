"""The inputs of a prediction, with the names of their outputs: a file, folder or glob of images, or latent codes."""

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
    """One input image, or one code of a latents file.

    Args:
        path: the file.
        name: path of its outputs relative to the output folder, without a suffix.
    """

    path: Path
    name: str


def list_inputs(pattern: str, exclude: Path | None = None) -> list[InputFile]:
    """Return the images that match `pattern`, sorted and with unique names.

    Names mirror the tree below the folder, or below a glob's fixed part. If two files differ only in their suffix, the
    name includes the suffix.

    Args:
        pattern: a file, a folder (searched recursively), or a glob (`**` for any depth).
        exclude: the output folder, whose files are not inputs if it lies inside the input folder.

    Raises:
        UserError: if nothing matches, there are no images, or the output folder is the input folder.
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
        raise UserError(f"input={pattern} does not exist. Give a file, a folder or a glob.")
    if exclude is not None:
        if exclude.resolve() == root.resolve():
            raise UserError(f"output={exclude} is the folder of the inputs. Choose another folder.")
        files = [file for file in files if exclude.resolve() not in file.resolve().parents]
    if not files:
        raise UserError(f"input={pattern} contains no images. Known suffixes: {', '.join(SUFFIXES)}.")
    relative = [file.relative_to(root) for file in files]
    count = Counter(file.with_suffix("") for file in relative)
    names: dict[str, None] = {}  # an ordered set
    for file in relative:
        name = (file.with_suffix("") if count[file.with_suffix("")] == 1 else file).as_posix()
        free = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
        names[next(candidate for candidate in free if candidate not in names)] = None
    return [InputFile(file, name) for file, name in zip(files, names, strict=True)]


class InputDataset(Dataset[dict[str, Any]]):
    """Input images as tensors. A file that cannot be read becomes an item with `error` instead of an exception.

    Items contain `index`, `seconds` (reading time) and either `source` (spec.channels, size, size) or `error`. Items of
    inpainting also contain `known` (3, size, size), the image for compositing.

    Args:
        files: the inputs.
        spec: description of the network's input.
        factor: down-sampling factor to apply first (superres).
        masks: mask files by stem (inpainting). None: as `load_source` without a mask.
        seed: of drawn holes. Each file gets its own hole, independent of the batch size and the number of devices.
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
            mask = None
            if masked and self.masks is not None:
                mask = self.masks.get(file.path.stem)
                if mask is None:
                    raise UserError(f"{file.path}: mask.dir has no mask named {file.path.stem}.*")
            item["source"] = load_source(file.path, self.spec, rng=rng, factor=self.factor, mask=mask)
            if masked:
                item["known"] = rgb(file.path, self.spec.size)
        except UserError as error:
            item["error"] = str(error)
        return {**item, "seconds": time.perf_counter() - start}


class LatentDataset(Dataset[dict[str, Any]]):
    """Latent codes. Items contain `index`, `seconds` and `latents`, one code.

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
    """Collate items into a batch. `failed` lists the (index, error, seconds) of items with errors."""
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

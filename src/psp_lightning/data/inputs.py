"""The inputs of a prediction, with the names of their outputs: a file, folder or glob of images, or latent codes."""

from __future__ import annotations

import glob
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from psp_lightning.data.pairing import expand, list_images, pair_masks
from psp_lightning.data.spec import InputSpec, load_source, source_to_rgb
from psp_lightning.data.transforms import rgb
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import to_pil
from psp_lightning.utils.pictures import open_image


@dataclass(frozen=True)
class InputFile:
    """One input image, or one code of a latents file.

    Args:
        path: the file.
        name: path of its outputs relative to the output folder, without a suffix.
        root: the folder that was searched; masks are paired by the path below it.
    """

    path: Path
    name: str
    root: Path = Path()


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
        return [InputFile(path, path.stem, path.parent)]
    if path.is_dir():
        root, files = path, list_images(path, "input folder")
    elif glob.has_magic(pattern):
        root, files = expand(pattern)
    else:
        raise UserError(f"input={pattern} does not exist. Give a file, a folder or a glob.")
    if exclude is not None:
        if exclude.resolve() == root.resolve():
            raise UserError(f"output={exclude} is the folder of the inputs. Choose another folder.")
        files = [file for file in files if exclude.resolve() not in file.resolve().parents]
    if not files:
        raise UserError(f"input={pattern} contains no images that Pillow can read.")
    relative = [file.relative_to(root) for file in files]
    count = Counter(file.with_suffix("") for file in relative)
    names: dict[str, None] = {}  # an ordered set
    for file in relative:
        name = (file.with_suffix("") if count[file.with_suffix("")] == 1 else file).as_posix()
        free = (name if k == 1 else f"{name}_{k}" for k in itertools.count(1))
        names[next(candidate for candidate in free if candidate not in names)] = None
    return [InputFile(file, name, root) for file, name in zip(files, names, strict=True)]


def input_masks(files: list[InputFile], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return, by the input's path, the mask of each input that has one in `folder`; see `pair_masks`."""
    return pair_masks([os.fspath(file.path) for file in files], files[0].root, folder) if files else {}


class InputDataset(Dataset[dict[str, Any]]):
    """Input images as tensors. A file that cannot be read becomes an item with `error` instead of an exception.

    Items contain `index`, `seconds` (reading time) and either `source` (spec.channels, size, size) or `error`. Items of
    inpainting also contain `known` (3, size, size), the image for compositing.

    Args:
        files: the inputs.
        spec: description of the network's input.
        factor: down-sampling factor to apply first (superres).
        masks: folder of masks (inpainting), paired with the files. None: as `load_source` without a mask.
        seed: seed of drawn holes. Each file gets its own hole, independent of the batch size and the number of devices.
        target_size: items also contain `target` (3, target_size, target_size), the image itself; None: they do not.
    """

    def __init__(
        self,
        files: list[InputFile],
        spec: InputSpec,
        factor: int | None = None,
        masks: str | os.PathLike[str] | None = None,
        seed: int = 0,
        target_size: int | None = None,
    ) -> None:
        self.files, self.spec, self.factor, self.seed = files, spec, factor, seed
        self.target_size = target_size
        self.masks = None if masks is None else input_masks(files, masks)

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
                mask = self.masks.get(os.fspath(file.path))
                if mask is None:
                    below = file.path.relative_to(file.root).with_suffix("").as_posix()
                    raise UserError(
                        f"{file.path}: mask.dir has no mask named {file.path.stem}.* (if names repeat: {below}.*)"
                    )
            twice = masked or self.target_size is not None
            picture = open_image(file.path) if twice else file.path  # decode once for both images
            item["source"] = load_source(picture, self.spec, rng=rng, factor=self.factor, mask=mask)
            if masked:
                item["known"] = rgb(picture, self.spec.size)
            if self.target_size is not None:
                item["target"] = rgb(picture, self.target_size)
        except UserError as error:
            item["error"] = str(error)
        return {**item, "seconds": time.perf_counter() - start}

    def picture(self, index: int) -> Image.Image:
        """Return an input as the network sees it, in RGB; a white picture if the file cannot be read."""
        item = self[index]
        if "error" in item:
            return Image.new("RGB", (self.spec.size, self.spec.size), "white")
        return to_pil(source_to_rgb(item["source"][None], self.spec)[0])


class LatentDataset(Dataset[dict[str, Any]]):
    """Latent codes. Items contain `index`, `seconds` and `latents`, one code, or `error`.

    Args:
        codes: (N, z_dim), (N, style_dim) or (N, n_styles, style_dim) float32.
        read: returns further entries of an item, such as its `features`; a `UserError` becomes its `error`.
    """

    def __init__(self, codes: Tensor, read: Callable[[int], dict[str, Any]] | None = None) -> None:
        self.codes, self.read = codes, read

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = time.perf_counter()
        item = {"index": index, "latents": self.codes[index]}
        try:
            item |= self.read(index) if self.read is not None else {}
        except UserError as error:
            item["error"] = str(error)
        return {**item, "seconds": time.perf_counter() - start}


def collate_inputs(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate items into a batch. `failed` lists the (index, error, seconds) of items with errors."""
    good = [item for item in items if "error" not in item]
    batch: dict[str, Any] = {
        "index": [item["index"] for item in good],
        "seconds": [item["seconds"] for item in good],
        "failed": [(item["index"], item["error"], item["seconds"]) for item in items if "error" in item],
    }
    for key in ("source", "known", "target", "latents", "features"):
        if good and key in good[0]:
            batch[key] = torch.stack([item[key] for item in good])
    if good and "weights" in good[0]:
        batch["weights"] = [item["weights"] for item in good]
    return batch

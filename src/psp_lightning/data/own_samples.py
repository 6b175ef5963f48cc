"""The user's datasets, whose items are samples already: map-style, or a stream that can only be read in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from psp_lightning.data.spec import InputSpec
from psp_lightning.utils.errors import UserError


class OwnSamples(Dataset[dict[str, Any]]):
    """The user's map-style dataset, with the keys of a `TaskDataset`.

    Args:
        items: has `len` and is indexed by 0, 1, ...; each item is a dict with `source` and `target`, float32 tensors as
            `TaskDataset` gives them, and optionally `path`, a name for messages.
        spec: description of the source.
        target_size: height and width of the target.
    """

    def __init__(self, items: Any, spec: InputSpec, target_size: int) -> None:
        self.items, self.spec, self.target_size = items, spec, target_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Return a sample. The key is `(epoch, index)` or an index; the dataset sees only the index."""
        index = key[1] if isinstance(key, tuple) else key
        return sample(self.items[index], index, self.spec, self.target_size)


class SampleStream(IterableDataset[dict[str, Any]]):
    """The user's iterable dataset, with the keys of a `TaskDataset`; `index` counts the samples of a process.

    The stream must divide its samples among ranks and worker processes itself.

    Args:
        items: yields dicts like the items of `OwnSamples`.
        spec: description of the source.
        target_size: height and width of the target.
    """

    def __init__(self, items: Any, spec: InputSpec, target_size: int) -> None:
        self.items, self.spec, self.target_size = items, spec, target_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(self.items):
            yield sample(item, index, self.spec, self.target_size)


def sample(item: Any, index: int, spec: InputSpec, target_size: int) -> dict[str, Any]:
    """Return an item with all keys of a sample.

    Raises:
        UserError: the item is not a dict, or its source or target is missing or has another type or shape.
    """
    if not isinstance(item, dict):
        raise UserError(f"data: item {index} is a {type(item).__name__}. It must be a dict with source and target.")
    shapes = {"source": (spec.channels, spec.size, spec.size), "target": (3, target_size, target_size)}
    for name, shape in shapes.items():
        value = item.get(name)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or tuple(value.shape) != shape:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            size = "domain.input_size" if name == "source" else "domain.target_size"
            raise UserError(
                f"data: the {name} of item {index} is {found}. It must be a float32 tensor of shape {shape}; {size} "
                "sets the size."
            )
    path = str(item.get("path", f"sample {index}"))
    return {"source": item["source"], "target": item["target"], "path": path, "index": torch.tensor(index)}

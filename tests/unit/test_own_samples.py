"""The user's datasets: their samples, their order, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from psp_lightning.data.datamodules import InversionDataModule, Sketch2FaceDataModule
from psp_lightning.data.loader import EpochSampler
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.utils.errors import UserError

SIZE = 32


def item(index: int, channels: int = 3) -> dict[str, Any]:
    return {"source": torch.full((channels, SIZE, SIZE), index / 10), "target": torch.full((3, SIZE, SIZE), index / 10)}


class Map(Dataset[Any]):
    def __init__(self, n: int, **more: Any) -> None:
        self.n, self.more = n, more

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**item(index), **self.more}


class Stream(IterableDataset[Any]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return (item(index) for index in range(self.n))


def module(train: Any, val: Any, **more: Any) -> InversionDataModule:
    return InversionDataModule(train, val, input_size=SIZE, target_size=SIZE, batch_size=4, **more)


def test_a_map_style_dataset_has_the_order_of_a_store_and_resumes() -> None:
    data = module(Map(10), Map(3), seed=5)
    loader = data.train_dataloader()
    batches = [batch["index"].tolist() for batch in loader]
    assert sum(batches, []) == EpochSampler(10, seed=5).order(0).tolist()

    loader = data.train_dataloader()
    first = iter(loader)
    next(first)
    state = loader.state_dict()
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert [batch["index"].tolist() for batch in resumed] == batches[1:]

    (val,) = data.val_dataloader()
    assert val["index"].tolist() == [0, 1, 2] and val["path"] == ["sample 0", "sample 1", "sample 2"]
    assert torch.equal(val["source"][:, 0, 0, 0], torch.tensor([0.0, 0.1, 0.2]))


def test_paths_are_kept() -> None:
    (batch,) = module(Map(1), Map(2, path="face.jpg")).val_dataloader()
    assert batch["path"] == ["face.jpg", "face.jpg"]


def test_a_stream_is_read_in_its_order_in_every_epoch() -> None:
    data = module(Stream(6), Stream(3))
    loader = data.train_dataloader()
    for _ in range(2):
        assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5]]
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2]]


def test_a_dataset_and_a_store_can_be_combined() -> None:
    data = module(Stream(6), ToyFacesStore(size=SIZE, n=2))
    data.setup("fit")
    assert not data.source_is_target, "the source of a user's sample may be anything"
    assert len(next(iter(data.val_dataloader()))["path"]) == 2


def test_generated_samples_join_a_map_style_dataset() -> None:
    batch = next(iter(module(Map(8), Map(2), generated_share=0.5).train_dataloader()))
    assert len(batch["source"]) == 2 and len(batch["seeds"]) == 2


def test_generated_samples_cannot_join_a_stream() -> None:
    with pytest.raises(UserError, match=r"data.generated_share cannot be used with a stream"):
        module(Stream(8), Map(2), generated_share=0.5).train_dataloader()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"source": torch.zeros(3, 8, 8)}, r"source of item 0 is torch.float32 \(3, 8, 8\).*domain.input_size"),
        ({"target": torch.zeros(1, SIZE, SIZE)}, r"target of item 0 .*\(3, 32, 32\); domain.target_size"),
        ({"target": torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)}, r"target of item 0 is torch.uint8"),
        ({"source": None}, r"source of item 0 is NoneType"),
    ],
)
def test_items_that_do_not_fit(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(iter(module(Map(1), Map(1, **more)).val_dataloader()))


def test_an_item_that_is_no_dict() -> None:
    class Pairs(Map):
        def __getitem__(self, index: int) -> Any:
            return tuple(item(index).values())

    with pytest.raises(UserError, match="item 0 is a tuple. It must be a dict with source and target"):
        next(iter(module(Map(1), Pairs(1)).val_dataloader()))


def test_the_task_decides_the_channels() -> None:
    data = Sketch2FaceDataModule(Map(1), Map(1), input_size=SIZE, target_size=SIZE)
    with pytest.raises(UserError, match=r"must be a float32 tensor of shape \(1, 32, 32\)"):
        next(iter(data.val_dataloader()))


@pytest.mark.parametrize("empty", [Map(0), Stream(0)])
def test_an_empty_training_set_is_an_error(empty: Any) -> None:
    """Without it, a stream would be read for ever, and a map-style dataset would end a training at step 0."""
    with pytest.raises(UserError, match="data: the (dataset|stream of samples) is empty"):
        next(iter(module(empty, Map(2)).train_dataloader()), None)


def test_a_stream_whose_source_is_used_up_is_an_error() -> None:
    class Once(Stream):
        def __init__(self) -> None:
            self.items = iter([item(0), item(1)])

        def __iter__(self) -> Iterator[Any]:
            return self.items

    loader = module(Once(), Map(2)).train_dataloader()
    assert len(list(loader)) == 1
    with pytest.raises(UserError, match="that it can be read more than once"):
        list(loader)

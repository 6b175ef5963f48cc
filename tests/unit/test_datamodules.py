"""Every task on drawn faces and on folders, with and without a Trainer."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from psp_lightning.data.datamodules import DATAMODULES, InpaintingDataModule, Seg2FaceDataModule, SuperResDataModule
from psp_lightning.data.stores import FolderStore, PairLayout, ToyFacesStore
from psp_lightning.data.toyfaces import write_dataset
from psp_lightning.utils.errors import UserError

CHANNELS = {
    "inversion": 3,
    "sketch2face": 1,
    "seg2face": 19,
    "superres": 3,
    "frontalization": 3,
    "inpainting": 4,
    "toonify": 3,
}


def options(**more):
    return {"input_size": 32, "target_size": 48, "batch_size": 4} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("faces"), n=6, size=40, seed=0, progress=False)


def test_all_tasks_exist():
    assert set(DATAMODULES) == set(CHANNELS)


@pytest.mark.parametrize("task", CHANNELS)
def test_toy_faces(task):
    data = DATAMODULES[task](functools.partial(ToyFacesStore, 48, 0, 10), ToyFacesStore(48, 1, 5), **options())
    assert data.in_channels == CHANNELS[task]
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["path"]) for batch in batches] == [4, 4, 2]
    batch = batches[0]
    assert batch["source"].shape == (4, CHANNELS[task], 32, 32) and batch["source"].dtype == torch.float32
    assert batch["target"].shape == (4, 3, 48, 48) and -1 <= batch["target"].min() < batch["target"].max() <= 1
    assert isinstance(batch["path"], list) and batch["index"].dtype == torch.int64
    first, second = list(data.val_dataloader()), list(data.val_dataloader())
    assert torch.cat([batch["index"] for batch in first]).tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(a["source"], b["source"]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("task", CHANNELS)
def test_folder_in_the_layout_of_celebamask_hq(task, folder):
    data = DATAMODULES[task](FolderStore(folder), FolderStore(folder, limit=2), **options(num_workers=1))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["source"].shape == (4, CHANNELS[task], 32, 32)
    assert all(path.endswith(".jpg") for path in batch["path"])
    assert sum(len(batch["path"]) for batch in data.val_dataloader()) == 2


def test_two_folders(folder):
    store = functools.partial(FolderStore, source=folder / "sketch", target=folder / "CelebA-HQ-img")
    data = DATAMODULES["sketch2face"](store, store, **options(input_size=40, target_size=40))
    item = data.dataset("val")[3]
    assert torch.equal(item["source"][0] * 255, torch.tensor(np.asarray(Image.open(folder / "sketch/3.png"))).float())
    # a picture from another folder as the target
    data = DATAMODULES["toonify"](store, store, **options())
    assert not data.source_is_target and data.dataset("train")[0]["source"].shape == (3, 32, 32)


def test_workers_change_nothing():
    def batches(workers):
        store = ToyFacesStore(32, 0, 9)
        data = DATAMODULES["inpainting"](store, store, **options(num_workers=workers))
        loader = data.train_dataloader()
        return [batch["source"] for _ in range(2) for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2), strict=True))


def test_masks_of_files(tmp_path, folder):
    for i in range(6):
        mask = np.zeros((40, 40), np.uint8)
        mask[i] = 255
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
    store = FolderStore(folder)
    data = InpaintingDataModule(store, store, mask="file", mask_dir=tmp_path, **options(input_size=40))
    assert data.dataset("train")[4]["source"][3].nonzero()[:, 0].unique().tolist() == [4]
    assert data.spec.mask == {"kind": "random"}, "a checkpoint must not require the masks of the training images"
    (tmp_path / "3.png").unlink()
    data = InpaintingDataModule(store, store, mask="file", mask_dir=tmp_path, **options())
    with pytest.raises(UserError, match=r"1 image without a mask of the same name.*3\.jpg"):
        data.setup()
    data = InpaintingDataModule(store, store, mask="file", mask_dir=tmp_path, mask_paired=False, **options())
    assert data.dataset("train")[3]["source"][3].sum() > 0


def test_masks_of_repeated_names_pair_by_path(tmp_path):
    for i, name in enumerate(("a", "b")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "mask" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / "1.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[i] = 255
        Image.fromarray(mask).save(tmp_path / "mask" / name / "1.png")
    train, val = (FolderStore(tmp_path / "in", part=part, val_share=0.5) for part in ("train", "val"))
    data = InpaintingDataModule(train, val, mask="file", mask_dir=tmp_path / "mask", **options(input_size=8))
    for part in ("train", "val"):
        item = data.dataset(part)[0]
        assert item["source"][3].nonzero()[:, 0].unique().tolist() == [("a", "b").index(Path(item["path"]).parent.name)]
    # one mask for both images would be used twice
    (tmp_path / "mask" / "a" / "1.png").unlink()
    data = InpaintingDataModule(train, val, mask="file", mask_dir=tmp_path / "mask" / "b", **options(input_size=8))
    with pytest.raises(UserError, match=r"1 image without a mask of the same name"):
        data.setup()


def test_source_is_target():
    store = ToyFacesStore(32, 0, 3)
    assert DATAMODULES["inversion"](store, store, **options(target_size=32)).source_is_target
    assert not DATAMODULES["inversion"](store, store, **options()).source_is_target
    assert not DATAMODULES["toonify"](store, store, **options(target_size=32)).source_is_target


def test_flip_argument():
    store = ToyFacesStore(32, 0, 3)
    flips = {flip: DATAMODULES["inversion"](store, store, flip=flip).flip for flip in (None, False, 0.25)}
    assert (
        flips == {None: 0.5, False: 0.0, 0.25: 0.25} and DATAMODULES["inversion"](store, store, flip=True).flip == 0.5
    )
    assert DATAMODULES["seg2face"](store, store, flip=True).flip == 0.0


def test_errors(tmp_path):
    store = ToyFacesStore(32, 0, 3)
    with pytest.raises(UserError, match="Did you mean 'brush'"):
        InpaintingDataModule(store, store, mask="brsh")
    with pytest.raises(UserError, match="mask_dir"):
        InpaintingDataModule(store, store, mask="file")
    with pytest.raises(UserError, match="factor 64"):
        SuperResDataModule(store, store, input_size=32, factors=[64])
    with pytest.raises(UserError, match="missing.yaml"):
        Seg2FaceDataModule(store, store, label_map="missing.yaml")
    with pytest.raises(UserError, match="batch_size"):
        DATAMODULES["inversion"](store, store, batch_size=0)
    with pytest.raises(UserError, match="does not exist"):
        DATAMODULES["inversion"](FolderStore(tmp_path / "none"), store).setup("fit")


class Seen(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_seen, self.val_seen = [], []

    def training_step(self, batch, _):
        self.train_seen.append(batch["index"].tolist())
        return self.layer(batch["target"].mean().reshape(1)).sum()

    def validation_step(self, batch, _):
        self.val_seen.append(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit(module, data, **more):
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def small(n=7, **more):
    return DATAMODULES["inversion"](ToyFacesStore(16, 0, n), ToyFacesStore(16, 1, 5), 16, 16, batch_size=2, **more)


def test_trainer_and_its_limits():
    module = Seen()
    fit(module, small(), max_epochs=1, use_distributed_sampler=False)
    assert sorted(sum(module.train_seen, [])) == list(range(7)) and module.val_seen == [[0, 1], [2, 3], [4]]
    module = Seen()
    fit(module, small(), max_epochs=2, limit_train_batches=0.5)
    assert len(module.train_seen) == 4
    module = Seen()
    fit(module, small(), max_epochs=3, overfit_batches=2)
    assert len(module.train_seen) == 6
    assert module.train_seen[:2] == module.train_seen[2:4] == module.train_seen[4:], "overfitting repeats its batches"


@pytest.mark.serial
def _rank(rank, port, folder):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    module = Seen()
    # Lightning's sampler replacement stays on and must not replace the library's sampler
    fit(module, small(), max_epochs=1, devices=2, strategy="ddp")
    torch.save({"train": module.train_seen, "val": module.val_seen}, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_gloo_ranks(tmp_path):
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [len(x) for x in a["train"]] == [len(x) for x in b["train"]] == [2, 2]
    seen = sum(a["train"] + b["train"], [])
    assert set(seen) == set(range(7)) and len(seen) == 8
    assert sorted(sum(a["val"] + b["val"], [])) == [0, 1, 2, 3, 4], "validation has each sample once"


@pytest.mark.parametrize(("n", "devices"), [(1, 2), (3, 4)])
def test_fewer_validation_images_than_devices_are_refused(n: int, devices: int) -> None:
    data = DATAMODULES["inversion"](ToyFacesStore(32, 0, 8), ToyFacesStore(32, 1, n), **options())
    data.trainer = SimpleNamespace(global_rank=0, world_size=devices)
    images = "1 validation image" if n == 1 else f"{n} validation images"
    with pytest.raises(UserError, match=f"^{images}, fewer than {devices} devices.*devices={n} or"):
        data.val_dataloader()
    data.trainer.world_size = n
    assert len(data.val_dataloader()) == 1


def test_a_layout_with_an_unknown_picture():
    with pytest.raises(UserError, match="source=photo is unknown.*Choose from: derived, image, sketch, labels"):
        PairLayout("mine", source="photo")
    with pytest.raises(UserError, match="target=front is unknown.*Did you mean 'frontal'"):
        PairLayout("mine", target="front")

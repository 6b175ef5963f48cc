"""One LightningDataModule per task. A task defines its source images, where they come from and their augmentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from psp_lightning.data.datasets import TaskDataset
from psp_lightning.data.generated import EPOCH, VALIDATION, GeneratedSamples, generated_per_batch
from psp_lightning.data.image_sets import ImageSet
from psp_lightning.data.labels import CELEBAMASK_HQ, LabelMap, load_label_map
from psp_lightning.data.loader import EpochSampler, MixedSampler, ReadableDataLoader, ResumableDataLoader
from psp_lightning.data.masks import draw_mask
from psp_lightning.data.own_samples import OwnSamples, SampleStream
from psp_lightning.data.pairing import pair_masks
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.stores import PairLayout, Store
from psp_lightning.utils.arguments import ArgumentError, number, whole
from psp_lightning.utils.compat import warn_moved
from psp_lightning.utils.errors import UserError, plural

StoreLike = Store | Callable[[], Store] | Dataset[Any]
Samples = TaskDataset | OwnSamples | SampleStream


class _DataModule(pl.LightningDataModule):
    """Base class of all data modules: the order of the samples, and the worker processes."""

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size = whole("batch_size", batch_size, 1)
        self.num_workers = whole("num_workers", num_workers, 0, 1024)
        self.seed = seed

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loading(self, dataset: Any, train: bool) -> dict[str, Any]:
        """Return `DataLoader` arguments for a dataset; a stream has its own order."""
        options: dict[str, Any] = {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
        if not isinstance(dataset, IterableDataset):
            options["sampler"] = EpochSampler(len(dataset), self.seed, train, *self._ranks(), pad=train)
        return options


class TaskDataModule(_DataModule):
    """Base class of the tasks. Batches contain `source`, `target`, `path` (list of str) and `index` (int64).

    Generated samples, the last ones of a batch, have only a seed in `seeds` until `LitPSP` draws them.

    Args:
        train, val: stores, or functions without arguments that create them (called on first use); or datasets whose
            items are samples already, see `OwnSamples` and `SampleStream`. None: no images; training then needs
            `generated_share=1`, and a validation has generated samples.
        input_size: height and width of the sources.
        target_size: height and width of the targets.
        batch_size: samples per batch and device in training.
        val_batch_size: samples per batch and device in validation. None: `batch_size`.
        num_workers: worker processes. 0: load in the main process. The number does not change the batches.
        seed: seed of the order and of all augmentation.
        flip: probability of mirroring in training. None or True: the task's default (0.5 for inversion,
            frontalization and toonify, 0 for the others, as in the reference). False: never.
        spec: description of the source. Subclasses build it from their arguments; the default is RGB.
        generated_share: share of each training batch that is generated, 0 to 1; only for inversion. It must be a whole
            number of samples.
        generated_limit: number of different samples if all are generated. With a limit, generated samples are the same
            in each epoch. None: new ones in each epoch.

    Raises:
        UserError: an argument is out of range, or `generated_share` does not fit.
    """

    layout: ClassVar[PairLayout]
    default_flip: ClassVar[float] = 0.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "view" in vars(cls):  # the name in version 0.1.0
            warn_moved(f"{cls.__qualname__}.view", f"{cls.__qualname__}.layout")
            cls.layout = vars(cls)["view"]

    def __init__(
        self,
        train: StoreLike | None,
        val: StoreLike | None,
        input_size: int = 256,
        target_size: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        flip: float | bool | None = None,
        spec: InputSpec | None = None,
        generated_share: float = 0.0,
        generated_limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        turned = self.layout.target == "frontal"  # the output is not in the place of the source
        self.spec = spec or InputSpec("rgb", input_size, task=self.layout.task if turned else None)
        self.target_size = target_size
        self.val_batch_size = whole("val_batch_size", val_batch_size, 1, optional=True) or self.batch_size
        self.flip = self.default_flip if flip is None or flip is True else number("flip", flip or 0.0, 0, 1)
        self._stores: dict[str, StoreLike | None] = {"train": train, "val": val}
        self._datasets: dict[str, Samples] = {}
        self.generated = generated_per_batch(generated_share, self.batch_size)
        self.generated_limit = whole("generated_limit", generated_limit, 1, optional=True)
        if self.generated and self.layout.task != "inversion":
            rule = (
                f"needs task=inversion: a generated image is its own target, which task={self.layout.task} cannot use."
            )
            raise ArgumentError("generated_share", generated_share, rule)
        if (train is None and self.generated < self.batch_size) or (val is None and not self.generated):
            rule = "needs images: choose data=folder data.root=DIR. Without images, it must be 1."
            raise ArgumentError("generated_share", generated_share, rule)

    @property
    def in_channels(self) -> int:
        """Number of channels of the source."""
        return self.spec.channels

    @property
    def source_is_target(self) -> bool:
        """Whether `source` and `target` of a batch are always equal."""
        own = any(isinstance(given, Dataset) for given in self._stores.values())  # of which nothing is known
        return not own and self.layout == PairLayout("inversion") and self.spec.size == self.target_size

    def setup(self, stage: str | None = None) -> None:
        """List the files, so that mistakes in them are reported before training starts."""
        for split in ("train", "val") if stage in (None, "fit") else ("val",):
            if self.has_images(split):
                self.dataset(split)

    def has_images(self, split: str) -> bool:
        """Return whether `train` or `val` has images. Otherwise all its samples are generated."""
        return self._stores[split] is not None and (split == "val" or self.generated < self.batch_size)

    def store(self, split: str) -> Store:
        """Return the store of `train` or `val`, which `dataset` prepares."""
        given = self._stores[split]
        assert given is not None and not isinstance(given, Dataset), f"{split} has no store"
        store = self._stores[split] = given if isinstance(given, Store) else given()
        return store

    def has_store(self, split: str) -> bool:
        """Return whether the images of `train` or `val` are in a store, not in the user's dataset."""
        return self.has_images(split) and not isinstance(self._stores[split], Dataset)

    def dataset(self, split: str) -> Samples:
        """Return the dataset of `train` or `val`."""
        given = self._stores[split]
        if split not in self._datasets and isinstance(given, Dataset):
            kind = SampleStream if isinstance(given, IterableDataset) else OwnSamples
            self._datasets[split] = kind(given, self.spec, self.target_size)
        if split not in self._datasets:
            store = self.store(split)
            store.prepare(self.layout)
            self._datasets[split] = TaskDataset(
                store,
                self.spec,
                self.target_size,
                seed=self.seed,
                flip=self.flip,
                independent_flip=self.layout.target == "frontal" and not store.paired,
                train=split == "train",
                masks=self._masks(store),
            )
        return self._datasets[split]

    def _masks(self, store: Store) -> dict[str, Path] | None:
        """Return mask files by the path of their target, or None to draw holes."""
        return None

    def _samples(self, split: str) -> Dataset[Any]:
        """Return what the loader of `train` or `val` reads: images, generated samples or both."""
        images, train = self.dataset(split) if self.has_images(split) else None, split == "train"
        if images is not None and not (train and self.generated):
            return images
        if isinstance(images, SampleStream):
            raise UserError("data.generated_share cannot be used with a stream of samples. Set it to 0 or 1.")
        limit = self.generated_limit
        n = (limit or EPOCH) if train else min(limit or VALIDATION, VALIDATION)
        sizes = (self.spec.size, self.target_size)
        return GeneratedSamples(images, n, *sizes, seed=self.seed, fixed=limit is not None, train=train)

    def train_dataloader(self) -> ReadableDataLoader:
        dataset = self._samples("train")
        loading = self._loading(dataset, train=True)
        if isinstance(dataset, IterableDataset):
            return ReadableDataLoader(dataset, batch_size=self.batch_size, generator=torch.Generator(), **loading)
        if isinstance(dataset, GeneratedSamples):
            loading["collate_fn"] = dataset.collate
            if dataset.images is not None:
                if getattr(self.trainer, "overfit_batches", 0):  # Lightning would replace the sampler
                    raise UserError(
                        "trainer.overfit_batches cannot be used with images and generated samples. Set "
                        "data.generated_share to 0 or 1."
                    )
                images = self.batch_size - self.generated
                loading["sampler"] = MixedSampler(len(dataset), images, self.generated, self.seed, *self._ranks())
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        if isinstance(limit, float):  # a fraction of the epoch
            limit = int(limit * -(-len(loading["sampler"]) // self.batch_size))
        # by keyword, because Lightning makes a copy with another sampler for `overfit_batches`
        return ResumableDataLoader(dataset=dataset, batch_size=self.batch_size, limit=limit, **loading)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader.

        Raises:
            UserError: if there are fewer samples than devices: Lightning validates on all devices or on none.
        """
        dataset: Any = self._samples("val")
        devices = self._ranks()[1]
        if not isinstance(dataset, IterableDataset) and len(dataset) < devices:
            raise UserError(
                f"{plural(len(dataset), 'validation image')}, fewer than {devices} devices. Add images, or set "
                f"trainer.devices={len(dataset)} or trainer.limit_val_batches=0."
            )
        loading = self._loading(dataset, train=False)
        if isinstance(dataset, GeneratedSamples):
            loading["collate_fn"] = dataset.collate
        return ReadableDataLoader(dataset, batch_size=self.val_batch_size, generator=torch.Generator(), **loading)


class InversionDataModule(TaskDataModule):
    """Images to themselves: the encoder learns to find the code of an image."""

    layout = PairLayout("inversion")
    default_flip = 0.5


class Sketch2FaceDataModule(TaskDataModule):
    """Sketches (1 channel in [0, 1]) to images."""

    layout = PairLayout("sketch2face", "sketch")

    def __init__(self, train: StoreLike, val: StoreLike, input_size: int = 256, **options: Any) -> None:
        super().__init__(train, val, spec=InputSpec("sketch", input_size), **options)


class Seg2FaceDataModule(TaskDataModule):
    """Label maps (one-hot) to images.

    Args:
        label_map: label-map file, or its contents. None: CelebAMask-HQ's 19 classes.
        interpolation: `nearest`, or `legacy_bilinear`, which the released weights were trained with.
    """

    layout = PairLayout("seg2face", "labels")

    def __init__(
        self,
        train: StoreLike,
        val: StoreLike,
        input_size: int = 256,
        label_map: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        interpolation: str = "nearest",
        **options: Any,
    ) -> None:
        if isinstance(label_map, Mapping):
            classes = LabelMap.from_dict(dict(label_map))
        else:
            classes = load_label_map(CELEBAMASK_HQ if label_map is None else label_map)
        spec = InputSpec("labels", input_size, len(classes), interpolation, label_map=classes.to_dict())
        super().__init__(train, val, spec=spec, **options)


class SuperResDataModule(TaskDataModule):
    """Low-resolution images to full-resolution images. The sources are targets down-sampled by a random factor.

    Args:
        factors: down-sampling factors to draw from.
    """

    layout = PairLayout("superres")

    def __init__(
        self,
        train: StoreLike,
        val: StoreLike,
        input_size: int = 256,
        factors: Sequence[int] | int = (1, 2, 4, 8, 16, 32),
        **options: Any,
    ) -> None:
        factors = [factors] if isinstance(factors, int) else list(factors)
        if not factors or not all(isinstance(factor, int) for factor in factors):
            raise UserError("task.datamodule.factors must be whole numbers, for example [1,2,4,8,16,32].")
        super().__init__(train, val, spec=InputSpec("lowres", input_size, factors=tuple(factors)), **options)


class FrontalizationDataModule(TaskDataModule):
    """Faces in any pose to frontal faces.

    Folders have no frontal images: as in the reference, source and target are the same image, mirrored independently.
    """

    layout = PairLayout("frontalization", "image", "frontal")
    default_flip = 0.5


class InpaintingDataModule(TaskDataModule):
    """Images with a hole (RGB, then the hole as fourth channel) to complete images.

    Args:
        mask: `box`, `brush`, `half`, `random` or `file`, or a mapping with options such as
            `{kind: box, low: 0.2, high: 0.4}`, see `psp_lightning.data.masks.draw_mask`.
        mask_dir: folder of masks for `file`, in which bright pixels are missing.
        mask_paired: pair masks with targets by name, as `psp_lightning.data.pairing.pair` does. False: draw a random
            mask for each sample.
    """

    layout = PairLayout("inpainting")

    def __init__(
        self,
        train: StoreLike,
        val: StoreLike,
        input_size: int = 256,
        mask: str | Mapping[str, Any] = "random",
        mask_dir: str | os.PathLike[str] | None = None,
        mask_paired: bool = True,
        **options: Any,
    ) -> None:
        drawn = {"kind": mask} if isinstance(mask, str) else dict(mask)
        self.mask_dir = drawn.pop("folder", mask_dir)
        self.mask_paired = mask_paired and drawn.get("kind") == "file"
        if drawn.get("kind") == "file":
            if self.mask_dir is None:
                raise UserError(
                    "task.datamodule.mask=file needs task.datamodule.mask_dir=DIR, a folder of masks in which bright "
                    "pixels are missing."
                )
            # The default for prediction. Paired masks do not apply to other images.
            drawn = {"kind": "random"} if self.mask_paired else {"kind": "file", "folder": os.fspath(self.mask_dir)}
        draw_mask(input_size, np.random.default_rng(0), **drawn)  # report a wrong option now, not in a worker
        super().__init__(train, val, spec=InputSpec("masked", input_size, mask=drawn), **options)

    def _masks(self, store: Store) -> dict[str, Path] | None:
        if not self.mask_paired or self.mask_dir is None:
            return None
        root, images = store.listing()
        masks = pair_masks(images, root, self.mask_dir)
        if missing := [path for path in store.paths() if path not in masks]:
            raise UserError(
                f"{plural(len(missing), 'image')} without a mask of the same name in {self.mask_dir}. The first: "
                f"{', '.join(missing[:3])}. Add the masks, or set task.datamodule.mask_paired=false to use any mask "
                "for any image."
            )
        return masks


class ToonifyDataModule(TaskDataModule):
    """Faces to cartoon faces. With a single folder the target is the source; the generator provides the style."""

    layout = PairLayout("toonify", "image", "toon")
    default_flip = 0.5


class ImageDataModule(_DataModule):
    """Training batches of an `ImageSet`, in the order of `EpochSampler(seed=seed)`.

    `batch_size` counts images per device. With `num_workers=0` the main process decodes or draws.
    """

    def __init__(self, images: ImageSet, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.images = images

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the loader.

        Raises:
            UserError: if there are fewer images than one batch across all devices.
        """
        n, (_, world) = len(self.images), self._ranks()
        if n < self.batch_size * world:
            raise UserError(
                f"{plural(n, 'image')}, fewer than one batch of {self.batch_size * world}. Add images, or set "
                f"data.batch_size={max(1, n // world)} or less."
            )
        loading = self._loading(self.images, train=True)
        return ResumableDataLoader(dataset=self.images, batch_size=self.batch_size, drop_last=True, **loading)


_TASKS = (
    InversionDataModule, Sketch2FaceDataModule, Seg2FaceDataModule, SuperResDataModule, FrontalizationDataModule,
    InpaintingDataModule, ToonifyDataModule,
)  # fmt: skip
DATAMODULES: dict[str, type[TaskDataModule]] = {cls.layout.task: cls for cls in _TASKS}

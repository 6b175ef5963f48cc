"""The order of the samples, and a data loader that can resume anywhere in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from psp_lightning.utils.errors import UserError


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """A sampler of (epoch, index) whose order depends only on (seed, epoch).

    Rank r takes every world_size-th index, starting at r. One step of all ranks therefore sees the same samples as one
    rank with the whole batch. Lightning does not replace the sampler because it is a `DistributedSampler`.

    Args:
        n: number of samples.
        seed: seed of the order.
        shuffle: False: the order is 0..n-1.
        rank, world_size: rank of this process, and number of processes.
        pad: repeat samples until all ranks have equally many, and drop none (training). False: use every sample exactly
            once, so that the numbers on two ranks may differ by one (validation).

    Raises:
        UserError: there are no samples.
    """

    def __init__(
        self, n: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1, pad: bool = True
    ) -> None:
        if n < 1:
            raise UserError("data: the dataset is empty, so there is nothing to train on.")
        super().__init__(range(n), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.n, self.pad = n, pad
        self.generated = 0  # samples of a batch that `MixedSampler` adds to the images
        self._start = (0, 0)

    def __len__(self) -> int:
        if self.pad:
            return -(-self.n // self.num_replicas)
        return len(range(self.rank, self.n, self.num_replicas))

    def order(self, epoch: int) -> np.ndarray:
        """Return this rank's indices in an epoch, int64."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n) if self.shuffle else np.arange(self.n)
        if self.pad:
            order = np.resize(order, len(self) * self.num_replicas)
        return order[self.rank :: self.num_replicas]

    def start_at(self, epoch: int, skip: int) -> None:
        """Start the next iteration in `epoch`, after its first `skip` samples."""
        self._start = (epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the loader counts the epochs, because only the loader knows where a run resumes."""

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch, skip = self._start
        return iter([(epoch, int(index)) for index in self.order(epoch)[skip:]])


class MixedSampler(EpochSampler):
    """An `EpochSampler` of batches with images first and generated samples last.

    The indices 0..n-1 are images. Those from n on are generated samples, and each occurs once in an epoch. All batches
    are full, and the last images of an epoch are followed by some of its first ones. As in an `EpochSampler`, one step
    of all ranks sees the same samples as one rank with the whole batch.

    Args:
        n: number of images.
        images, generated: number of both in the batch of one rank, at least 1.
        seed, rank, world_size: as in `EpochSampler`.
    """

    def __init__(self, n: int, images: int, generated: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(n, seed, True, rank, world_size)
        self.images, self.generated = images, generated

    def _batches(self) -> int:
        return -(-self.n // (self.images * self.num_replicas))

    def __len__(self) -> int:
        return self._batches() * (self.images + self.generated)

    def order(self, epoch: int) -> np.ndarray:
        world, batches = self.num_replicas, self._batches()
        images = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        images = np.resize(images, (batches, self.images * world))
        generated = self.n + np.arange(batches * self.generated * world).reshape(batches, -1)
        return np.concatenate([images[:, self.rank :: world], generated[:, self.rank :: world]], axis=1).ravel()


class ReadableDataLoader(DataLoader[Any]):
    """A DataLoader that rejects an empty stream and re-raises a worker's `UserError` without the worker's traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        empty = isinstance(self.dataset, IterableDataset)
        try:
            for batch in super().__iter__():
                empty = False
                yield batch
        except UserError as error:
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        if empty:  # a training would start one epoch after the other without a step
            raise UserError(
                "data: the stream of samples is empty. Check the names of its files, that it can be read more than "
                "once, and that every process gets a part of it."
            )


class ResumableDataLoader(ReadableDataLoader):
    """A DataLoader whose `state_dict` counts the batches that the consumer received, excluding prefetched ones.

    Each iteration is the next epoch, except for the first one after `load_state_dict`, which continues from that state.
    Lightning stores the state in its checkpoints and restores it before the first batch.

    Args:
        dataset: a dataset indexed by (epoch, index).
        batch_size: samples per batch and rank.
        sampler: the order. Any other sampler (Lightning inserts one for `overfit_batches`) means the order 0..n-1.
        limit: batches that the consumer takes of each epoch (`Trainer(limit_train_batches=...)`). None: all.
        options: further arguments of `DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, sampler: Sampler[Any], limit: int | None = None, **options: Any
    ) -> None:
        if not isinstance(sampler, EpochSampler):
            distributed = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
            sampler = EpochSampler(len(dataset), 0, False, rank, world_size)  # type: ignore[arg-type]
        # DataLoader draws a seed for its workers in each epoch. Drawing it from the global stream would make a resumed
        # run differ from one that was not interrupted.
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **options)
        self.limit = limit
        self._epoch, self._batches, self._restored = 0, 0, False

    def state_dict(self) -> dict[str, int]:
        """Return plain numbers: the next `epoch` and its used `batches`, and the settings that they depend on."""
        return {"epoch": self._epoch, "batches": self._batches, **self._settings()}

    def _settings(self) -> dict[str, int]:
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        assert self.batch_size is not None
        world = sampler.num_replicas
        return {
            "samples": sampler.n,
            "batch_size": self.batch_size * world,
            "seed": sampler.seed,
            "generated_samples": sampler.generated * world,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state` in the next iteration.

        Raises:
            UserError: if the state is in the middle of an epoch and the number of samples, the global batch size or the
                seed differs.
        """
        if state["batches"]:
            for name, now in self._settings().items():
                if state.get(name, now) != now:
                    raise UserError(
                        f"Cannot resume in the middle of an epoch: {name.replace('_', ' ')} was {state[name]} in the "
                        f"interrupted run and is {now} now (batch size counts all devices). Resume with the same "
                        "settings, or start a new run with init_from=CHECKPOINT, which loads only the weights."
                    )
        self._epoch, self._batches, self._restored = int(state["epoch"]), int(state["batches"]), True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # This is a generator: nothing happens before the first batch is requested.
        if self._batches and not self._restored:  # the previous iteration stopped early
            self._epoch, self._batches = self._epoch + 1, 0
        self._restored = False
        epoch, done = self._epoch, self._batches
        last = len(self) if self.limit is None else min(self.limit, len(self))
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        assert self.batch_size is not None
        sampler.start_at(epoch, done * self.batch_size)
        for batch in super().__iter__():
            done += 1
            self._epoch, self._batches = (epoch, done) if done < last else (epoch + 1, 0)
            yield batch

"""Order of the samples, and a loader that can stop and go on anywhere in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from psp_lightning.utils.errors import UserError


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index); the order depends on (seed, epoch) alone.

    Rank r takes every world_size-th index, so that one step of all ranks sees the same samples as one rank with the
    whole batch. It is a `DistributedSampler` so that Lightning leaves it in place.

    Args:
        n: number of samples.
        seed: of the order.
        shuffle: else the order is 0..n-1.
        rank, world_size: this process and their number.
        pad: training: wrap around until every rank has equally many, nothing is dropped. False: validation, every
            sample exactly once, and ranks may differ by one.
    """

    def __init__(
        self, n: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1, pad: bool = True
    ) -> None:
        super().__init__(range(n), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.n, self.pad = n, pad
        self._start = (0, 0)

    def __len__(self) -> int:
        if self.pad:
            return -(-self.n // self.num_replicas)
        return len(range(self.rank, self.n, self.num_replicas))

    def order(self, epoch: int) -> np.ndarray:
        """int64: the indices of this rank in this epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n) if self.shuffle else np.arange(self.n)
        if self.pad:
            order = np.resize(order, len(self) * self.num_replicas)
        return order[self.rank :: self.num_replicas]

    def start_at(self, epoch: int, skip: int) -> None:
        """The next iteration is `epoch` without its first `skip` samples."""
        self._start = (epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the loader counts the epochs, because only it knows about a resumed one."""

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch, skip = self._start
        return iter([(epoch, int(index)) for index in self.order(epoch)[skip:]])


class ReadableDataLoader(DataLoader[Any]):
    """A DataLoader from whose worker processes a `UserError` comes as it was raised, without their traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class ResumableDataLoader(ReadableDataLoader):
    """A DataLoader whose `state_dict` says which batches the consumer has got; prefetched ones do not count.

    Each new iteration is the next epoch, except the first after `load_state_dict`, which goes on where the state
    was taken. Lightning stores the state in its checkpoints and restores it before the first batch.

    Args:
        dataset: indexed by (epoch, index).
        batch_size: samples per batch and rank.
        sampler: the order. Another kind (Lightning puts one in for `overfit_batches`) becomes the order 0..n-1.
        limit: the consumer takes only so many batches of each epoch (`Trainer(limit_train_batches=...)`).
        options: further arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        sampler: Sampler[Any],
        limit: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(sampler, EpochSampler):
            many = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
            sampler = EpochSampler(len(dataset), 0, False, rank, world_size)  # type: ignore[arg-type]
        # an own generator: DataLoader draws a seed for its workers in each epoch, and would take it from the global
        # stream, which then differs between a resumed run and one that was not interrupted
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **options)
        self.limit = limit
        self._epoch, self._batches, self._restored = 0, 0, False

    def state_dict(self) -> dict[str, int]:
        """Plain numbers: `epoch` and `batches` say where to go on, the others what they were counted with."""
        return {"epoch": self._epoch, "batches": self._batches, **self._counted_with()}

    def _counted_with(self) -> dict[str, int]:
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        assert self.batch_size is not None
        return {
            "samples": sampler.n,
            "batch_size": self.batch_size * sampler.num_replicas,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration go on at `state`.

        Raises:
            UserError: for a state in the middle of an epoch of other data, another global batch size or seed.
        """
        if state["batches"]:
            for name, now in self._counted_with().items():
                if state.get(name, now) != now:
                    raise UserError(
                        f"Cannot go on in the middle of an epoch: {name.replace('_', ' ')} was {state[name]} in the "
                        f"interrupted run and is {now} now (batch size counts all devices). Resume with the same "
                        "settings, or start a new run with init_from=CHECKPOINT, which takes the weights only."
                    )
        self._epoch, self._batches, self._restored = int(state["epoch"]), int(state["batches"]), True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: nothing happens before the first batch is asked for
        if self._batches and not self._restored:  # the last iteration was left early
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

"""The order of the samples and resuming in the middle of an epoch, with and without Lightning."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from psp_lightning.data.loader import EpochSampler, ResumableDataLoader
from psp_lightning.lit.callbacks import EpochStart
from psp_lightning.utils.errors import UserError


class Keys(Dataset):
    """A dataset that returns the key itself: epoch * 1000 + index."""

    def __init__(self, broken=None):
        self.broken = broken

    def __getitem__(self, key):
        epoch, index = key
        if index == self.broken:
            raise UserError(f"Cannot read image {index}.png")
        return torch.tensor(1000 * epoch + index)


def loader(n=13, batch_size=2, rank=0, world_size=1, workers=0, limit=None, seed=0, **options):
    sampler = EpochSampler(n, seed, True, rank, world_size)
    options |= {"num_workers": workers, "persistent_workers": workers > 0}
    return ResumableDataLoader(Keys(), batch_size, sampler, limit=limit, **options)


def take(data, n):
    """Return the first n batches, over as many epochs as they take."""
    batches = []
    while len(batches) < n:
        for batch in data:
            batches.append(batch.tolist())
            if len(batches) == n:
                break
    return batches


def test_epochs_differ_and_seeds_differ():
    batches = take(loader(), 14)
    first, second = sum(batches[:7], []), sum(batches[7:], [])
    assert sorted(first) == list(range(13)) and sorted(second) == list(range(1000, 1013))
    assert [i - 1000 for i in second] != first
    assert take(loader(), 14) == batches and take(loader(seed=1), 14) != batches
    assert [len(batch) for batch in batches[:7]] == [2] * 6 + [1], "the last, smaller batch must be kept"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 7, 10, 14])
def test_resumes_with_the_remaining_batches(stop, workers):
    whole = take(loader(), 20)
    data = loader(workers=workers)
    seen, state, position = [], None, 0
    while position < stop:
        for batch in data:
            seen.append(batch.tolist())
            position += 1
            if position == stop:
                state = data.state_dict()  # read while workers have prepared more batches
                break
    assert seen == whole[:stop]
    assert state["epoch"] * 7 + state["batches"] == stop
    again = loader(workers=workers)
    again.load_state_dict(state)
    assert take(again, 20 - stop) == whole[stop:]


def test_iteration_left_early_starts_the_next_epoch():
    data = loader()
    next(iter(data))
    assert next(iter(data)).tolist()[0] >= 1000
    data = loader()
    iter(data)
    iter(data)  # no batch was requested, so it is still the first epoch
    assert next(iter(data)).tolist()[0] < 1000


def test_limit_ends_the_epoch():
    data = loader(limit=3)
    for _, _batch in zip(range(3), data, strict=False):
        pass
    assert data.state_dict()["epoch"] == 1 and data.state_dict()["batches"] == 0


@pytest.mark.parametrize("n", [1, 2, 7, 8, 13])
def test_two_ranks_see_what_one_rank_sees(n):
    one = take(loader(n, batch_size=4), -(-n // 4))
    ranks = [take(loader(n, batch_size=2, rank=rank, world_size=2), -(-n // 4)) for rank in (0, 1)]
    assert [len(a) for a in ranks[0]] == [len(b) for b in ranks[1]]
    for whole, a, b in zip(one, *ranks, strict=True):
        both = [x for pair in zip(a, b, strict=True) for x in pair]
        assert both[: len(whole)] == whole
    seen = sum(ranks[0] + ranks[1], [])
    assert set(seen) == set(range(n)) and len(seen) == n + n % 2


def test_two_ranks_resume():
    for rank in (0, 1):
        whole = take(loader(rank=rank, world_size=2), 9)
        data = loader(rank=rank, world_size=2)
        assert take(data, 6) == whole[:6]
        again = loader(rank=rank, world_size=2)
        again.load_state_dict(data.state_dict())
        assert take(again, 3) == whole[6:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 5, 6])
def test_validation_has_each_sample_once(n, world_size):
    samplers = [EpochSampler(n, 0, False, rank, world_size, pad=False) for rank in range(world_size)]
    seen = [key for sampler in samplers for key in sampler]
    assert sorted(seen) == [(0, i) for i in range(n)]
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_state_of_other_data_is_rejected_only_in_the_middle_of_an_epoch():
    data = loader()
    take(data, 3)
    state = data.state_dict()
    assert all(type(value) is int for value in state.values())
    for other, message in (
        (loader(n=14), "samples was 13"),
        (loader(batch_size=3), "batch size"),
        (loader(seed=5), "seed"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state_dict(state)
    # half the batch on two devices is the same global batch
    loader(batch_size=1, world_size=2).load_state_dict(state)
    loader(n=14).load_state_dict({**state, "batches": 0})


def test_the_global_random_stream_is_not_used():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    take(loader(), 9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_clear_message(workers):
    data = ResumableDataLoader(Keys(broken=4), 2, EpochSampler(8, shuffle=False), num_workers=workers)
    with pytest.raises(UserError) as error:
        list(data)
    assert str(error.value) == "Cannot read image 4.png"


# With Lightning: 20 steps against 10 steps, checkpoint, resume, 10 steps; 7 batches per epoch.


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch.tolist())
        return self.layer(batch.float()[:, None]).mean() + torch.rand(())

    def validation_step(self, batch, _):
        self.log("val", batch.float().mean(), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(tmp_path, steps, data, ckpt=None, **options):
    options = {"limit_val_batches": 0} | options
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochStart()],
        default_root_dir=tmp_path,
        **options,
    )
    module = Recorder()
    val = DataLoader(torch.arange(4), batch_size=2, generator=torch.Generator())
    trainer.fit(module, data, val, ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 7, 10, 14])
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path, stop, workers):
    _, whole = fit(tmp_path, 20, loader())
    assert whole.seen == take(loader(), 20)
    trainer, first = fit(tmp_path, stop, loader(workers=workers))
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    _, second = fit(tmp_path, 20, loader(workers=workers), ckpt=tmp_path / "stop.ckpt")
    assert first.seen == whole.seen[:stop]
    assert second.seen == whole.seen[stop:]


class SaveAt(pl.Callback):
    """A callback that writes a checkpoint in the middle of a run, as a crash would leave it."""

    def __init__(self, step, path, hook):
        self.step, self.path, self.hook = step, path, hook

    def _save(self, trainer):
        if trainer.global_step == self.step and not self.path.exists() and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_):
        if self.hook == "batch":
            self._save(trainer)

    def on_validation_end(self, trainer, *_):
        if self.hook == "validation":
            self._save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        if self.hook == "epoch":
            self._save(trainer)


@pytest.mark.parametrize("limit", [1.0, 5])
@pytest.mark.parametrize(
    ("hook", "stop"),
    [("batch", 4), ("batch", 5), ("batch", 7), ("batch", 10), ("validation", 4), ("validation", 8), ("epoch", 1)],
)
@pytest.mark.parametrize("every_epoch", [False, True])
def test_checkpoint_of_a_run_that_was_killed_later(tmp_path, hook, stop, limit, every_epoch):
    options = {"limit_train_batches": limit, "limit_val_batches": 1.0, "num_sanity_val_steps": 0}
    batches = None if limit == 1.0 else limit
    if not every_epoch:
        options |= {"val_check_interval": 4, "check_val_every_n_epoch": None}
    if hook == "epoch" or (hook == "validation" and every_epoch):
        stop = (2 if stop == 8 else 1) * (batches or 7)
    save = SaveAt(stop, tmp_path / "stop.ckpt", hook)
    trainer = pl.Trainer(
        max_steps=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[save, EpochStart()],
        **options,
    )
    whole = Recorder()
    trainer.fit(whole, loader(limit=batches), DataLoader(torch.arange(4), batch_size=2))
    assert save.path.exists()
    _, second = fit(tmp_path, 20, loader(limit=batches), ckpt=save.path, **options)
    assert second.seen == whole.seen[stop:]


def test_sampler_order_is_numpys(tmp_path):
    """NumPy guarantees this stream, so the order of a run never changes."""
    assert EpochSampler(8, seed=0).order(0).tolist() == np.random.default_rng([0, 0]).permutation(8).tolist()

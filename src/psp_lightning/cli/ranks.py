"""Ranks that torchrun or srun started: they agree on names and plans, and end if one of them is lost.

The ranks that `cli.launch` starts need none of this, because the process that starts them composes the job and watches
them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from psp_lightning import __version__
from psp_lightning.utils.devices import Rank, started_rank
from psp_lightning.utils.errors import UserError, plural

T = TypeVar("T")
CONTACT = 300  # seconds; the last rank may start this long after the first one
PART = 4 * 2**20  # characters of JSON, which is ASCII; a store takes up to 8 MiB at once
# the variables that tell one start of ranks from another
JOB = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
# messages of gloo, the store and NCCL about a lost rank
LOST = re.compile(r"[Cc]onnection (closed by peer|reset by peer|was likely closed)|Broken pipe|ncclRemoteError")


def share(make: Callable[[], T]) -> T:
    """Return the value that `make` returns on the first rank; the other ranks wait for it and do not call `make`.

    Without ranks of torchrun or srun, return `make()`. All ranks must call this equally often, in the same order. The
    value must be what JSON can hold.

    Raises:
        UserError: see `_store`, or the first rank is lost.
        SystemExit: `make` raised an exception on the first rank, which reports it.
    """
    if (rank := started_rank()) is None:
        return make()
    store, name = _store(), f"value/{next(_turns())}"
    if rank.rank == 0:
        try:
            content = json.dumps(value := make())
        except BaseException:
            store.set(name, "0")
            raise
        parts = [content[start : start + PART] for start in range(0, len(content), PART)]
        for number, part in enumerate(parts):
            store.set(f"{name}/{number}", part)
        store.set(name, str(len(parts)))  # last: the value is complete
        return value
    with reporting_lost_ranks():
        _wait(store, name)
        parts = [store.get(f"{name}/{number}").decode() for number in range(int(store.get(name)))]
    if not parts:
        raise SystemExit(1)
    received: T = json.loads("".join(parts))
    return received


def as_rank(job: Callable[[], T], folder: str | None) -> T:
    """Run the part of a job of this rank, one of those that torchrun or srun started.

    Args:
        job: the job.
        folder: the run folder, from which the job can be continued; None if it is continued by repeating the command.

    Raises:
        UserError: see `_store`, or another rank is lost.
    """
    _store()
    with reporting_lost_ranks(folder):
        return job()


@contextlib.contextmanager
def reporting_lost_ranks(folder: str | None = None) -> Iterator[None]:
    """Turn an error about a connection that another rank closed into a UserError."""
    import torch

    try:
        yield
    except RuntimeError as error:
        of_ranks = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)  # else of a database, say
        reason = LOST.search(str(error)) if of_ranks else None
        if not reason and not isinstance(error, torch.distributed.DistNetworkError):
            raise
        peer = re.search(r"\[[\w.:]+\]:\d+", str(error))  # as gloo writes addresses
        raise UserError(
            f"another process of this run has ended ({reason[0].lower() if reason else 'no connection'}"
            f"{f', {peer[0]}' if peer else ''}); its output says why. "
            f"{f'Continue with resume={folder}' if folder else 'To continue, repeat the command'} on all machines."
        ) from None


@functools.cache
def _turns() -> Iterator[int]:
    """Return the iterator that numbers the shared values."""
    return itertools.count()


@functools.cache
def _store() -> Any:
    """Connect to the other ranks, once, and return their common key-value store.

    The store is the one of torchrun's agents. Under srun, the first rank serves it where Lightning's process group
    connects, too, so no further port is needed.

    Raises:
        UserError: the ranks do not find each other, the port is taken, or the machines have different versions.
    """
    import torch

    from psp_lightning.lit.distributed import cluster

    rank = started_rank()
    assert rank is not None
    if rank.per_node is None:
        raise UserError("srun does not say how many processes run on each machine: give it --ntasks-per-node=DEVICES.")
    if rank.launcher == "torchrun":
        die_with(os.getppid())
    place = cluster()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
    address = f"{place.main_address}:{place.main_port}"
    try:
        base, *_ = next(
            torch.distributed.rendezvous("env://", rank.rank, rank.world, timeout=timedelta(seconds=CONTACT))
        )
    except torch.distributed.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {place.main_port} of {socket.gethostname()} is taken, perhaps by another run. Set MASTER_PORT "
                "to a free port, the same on all machines."
            ) from None
        missing = f"not all {plural(rank.world, 'process')} have started"
        other = f"the first of {plural(rank.world, 'process')} does not answer at {address}"
        raise UserError(
            f"{missing if rank.rank == 0 else other} after {CONTACT} seconds. Check that the "
            "command runs on all machines, and that they reach this address and port."
        ) from None
    job = [os.environ.get(name, "0") for name in JOB]  # a rank of another job that meets here by mistake waits in vain
    store = torch.distributed.PrefixStore(f"psp_lightning/{'/'.join(job)}", base)
    atexit.register(_leave)
    with reporting_lost_ranks():
        _compare_versions(store, rank)
    return store


def _leave() -> None:
    """Close the process group before the process ends, which a running thread of gloo would otherwise abort."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _compare_versions(store: Any, rank: Rank) -> None:
    """Raise a UserError on all ranks if one of them has other versions, with which results or messages would differ."""
    import torch

    python = ".".join(platform.python_version_tuple()[:2])
    mine = {"psp_lightning": __version__, "torch": torch.__version__, "Python": python}
    store.set(f"versions/{rank.rank}", json.dumps([socket.gethostname(), mine]))
    entries = []
    for number in range(rank.world):
        _wait(store, f"versions/{number}", CONTACT)
        entries.append(json.loads(store.get(f"versions/{number}")))
    if store.add("read", 1) == rank.world:
        store.set("all_read", "1")
    if rank.rank == 0:  # the others lose the store when this process ends
        _wait(store, "all_read", CONTACT)
    host, first = entries[0]
    for number, (other, versions) in enumerate(entries):
        if versions != first:
            name = next(name for name in first if versions[name] != first[name])
            raise UserError(
                f"process {number} on {other} has {name} {versions[name]}, but process 0 on {host} has {first[name]}. "
                "Install the same versions on all machines."
            )


def _wait(store: Any, name: str, limit: float = math.inf) -> None:
    """Wait until the store has a value; signals are handled meanwhile.

    Raises:
        UserError: there is none after `limit` seconds, because the process that should set it has ended.
    """
    start = time.monotonic()
    while not store.check([name]):
        if time.monotonic() - start > limit:
            raise UserError("another process ended before the run started; its output says why.")
        time.sleep(0.05)


def die_with(parent: int) -> None:
    """Ask the kernel to kill this rank when its parent ends for any reason (only on Linux)."""
    import ctypes
    import signal
    import sys

    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the request
            os._exit(1)

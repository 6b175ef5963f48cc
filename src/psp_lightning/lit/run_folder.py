"""Claims on run folders: one process writes to a run at a time, and no run starts over the checkpoints of another."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from psp_lightning.utils.devices import is_restarted
from psp_lightning.utils.errors import UserError

CLAIM = ".claim"
LAST = Path("checkpoints") / "last.ckpt"
PATIENCE = 0.5  # seconds; `is_claimed` holds a claim for an instant, which must not stop a training from starting
LEASE = 180  # seconds for a job that Slurm starts again; a network file system keeps the lock of a lost machine so long


def claim_run(folder: Path, resume: bool, hint: str) -> FileLock:
    """Create a run folder if necessary, claim it for this process, and return the claim.

    A claim is a lock of the operating system on a file in the folder. It ends when the process ends for any reason, so
    the claim of a dead process blocks nothing; after the loss of a whole machine, a network file system may keep it for
    some minutes. On a file system without locks, nothing is claimed.

    Args:
        folder: the run folder.
        resume: continue the run in the folder. False: the folder must not contain a run.
        hint: text for the message: how to continue a run and how to choose another folder.

    Raises:
        UserError: another process has claimed the folder, or it contains a run although `resume` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim = _lock(folder)
    try:
        claim.acquire(timeout=LEASE if is_restarted() else PATIENCE)
    except Timeout:
        raise UserError(f"Another process is writing to {folder}; wait until it ends. {hint}") from None
    except (OSError, NotImplementedError):  # no locks; if the folder is read-only, the first write says so
        pass
    if not resume and contains_run(folder):
        claim.release()
        raise UserError(f"{folder} contains a run already. {hint}")
    return claim


@contextlib.contextmanager
def claimed(folder: Path, resume: bool, hint: str) -> Iterator[None]:
    """Hold a claim of `claim_run` during a `with` block."""
    claim = claim_run(folder, resume, hint)
    try:
        yield
    finally:
        claim.release()


def is_claimed(folder: Path) -> bool:
    """Return whether a process has claimed a folder; False if nobody can tell, as on a file system without locks."""
    if not (folder / CLAIM).is_file():
        return False
    claim = _lock(folder)
    try:
        claim.acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    claim.release()
    return False


def new_folder(folder: Path) -> Path:
    """Create and return a folder that did not exist: `folder`, or with `_2`, `_3` and so on appended to its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain([folder], (folder.with_name(f"{folder.name}_{n}") for n in itertools.count(2))):
        try:
            path.mkdir()  # atomic: of several processes, one succeeds
        except FileExistsError:
            continue
        return path
    raise AssertionError


def contains_run(folder: Path) -> bool:
    """Return whether a folder contains complete checkpoints or exported generators; a crash can leave partial ones."""
    return any(_complete(folder, "checkpoints/*.ckpt")) or any(_complete(folder, "generator*.safetensors"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint from which the run in a folder resumes, or None if there is none.

    This is `last.ckpt`, or the newest checkpoint of a run that was killed before it wrote `last.ckpt`.
    """
    if (folder / LAST).is_file():
        return folder / LAST
    return max(_complete(folder, "checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _lock(folder: Path) -> FileLock:
    # newer versions of filelock would fall back to a lock file, which remains when its process is killed
    if "fallback_to_soft" in inspect.signature(FileLock).parameters:
        return FileLock(folder / CLAIM, fallback_to_soft=False)
    return FileLock(folder / CLAIM)


def _complete(folder: Path, pattern: str) -> Iterator[Path]:
    """Return the files that match a pattern; the name of an incomplete one starts with a dot."""
    return (file for file in folder.glob(pattern) if not file.name.startswith("."))

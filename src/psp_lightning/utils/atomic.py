"""Write files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Give a new, empty file in the folder of `path`, with its suffix, that takes its place when the block ends well.

    Args:
        path: is replaced, or stays as it was.
        sync: wait until the bytes are on the disk, so that a power failure cannot leave half of them.

    Raises:
        OSError: naming `path`, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        yield Path(part)
        if sync:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException as error:
        if part is not None:
            with contextlib.suppress(FileNotFoundError):  # it may have been moved already
                os.unlink(part)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
        raise


def save_torch(content: Any, path: str | os.PathLike[str]) -> None:
    """Call `torch.save` so that `path` holds a whole file or what it held before.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    import torch

    with replacing(path) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how PyTorch's writer says that it was interrupted, or that the disk is full
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise OSError(errno.ENOSPC, "cannot be written, the disk is probably full") from error

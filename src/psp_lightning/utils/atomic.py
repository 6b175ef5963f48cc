"""Atomic writing: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# failures of the disk, which would affect every later file, too; other failures concern one file
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yield a new, empty file in the folder of `path`, with the same suffix; move it to `path` if the block succeeds.

    Args:
        path: the file to create or replace; it does not change if the block raises.
        sync: wait until the bytes are on the disk, so a power failure cannot leave a partial file.

    Raises:
        OSError: the disk is full or the folder cannot be written. The error names `path`.
    """
    path = Path(path)
    part = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(errno.ENOTDIR, "a file has the name of its folder") from None
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
    """Call `torch.save` atomically.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    import torch

    with replacing(path) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's writer reports both an interrupt and a full disk this way
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise OSError(errno.ENOSPC, "cannot be written, the disk is probably full") from error

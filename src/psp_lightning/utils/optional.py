"""Packages that are not installed with this library, imported on first use."""

from __future__ import annotations

from types import ModuleType

from psp_lightning.utils.errors import UserError

FACENET = "pip install --no-deps facenet-pytorch==2.6.0"


def facenet_pytorch(what: str) -> ModuleType:
    """Import facenet-pytorch and return it.

    Args:
        what: the part of this library that needs it, for the message.

    Raises:
        UserError: the package is missing; the message contains the command that installs it.
    """
    try:
        import facenet_pytorch
    except ImportError as error:
        raise UserError(
            f"{what} needs the package facenet-pytorch. Its metadata forbids current torch and numpy, so install it "
            f"with: {FACENET} ({error})"
        ) from error
    return facenet_pytorch

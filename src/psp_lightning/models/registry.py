"""Networks by class name, so that a checkpoint names its classes and never brings code."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ClassT = TypeVar("ClassT", bound=type[nn.Module])

ENCODERS: dict[str, type[nn.Module]] = {}
GENERATORS: dict[str, type[nn.Module]] = {}
EMBEDDINGS: dict[str, type[nn.Module]] = {}


def _register(table: dict[str, type[nn.Module]], cls: ClassT) -> ClassT:
    known = table.get(cls.__name__)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"{cls.__name__} is registered already, by {known.__module__}.")
    table[cls.__name__] = cls
    return cls


def register_encoder(cls: ClassT) -> ClassT:
    """Class decorator: makes an encoder loadable by its class name.

    An encoder has `.config` (a dict of plain values that rebuilds it: `cls(**config)`), `.in_channels`, `.input_size`,
    and maps (B, in_channels, input_size, input_size) to (B, n_styles, style_dim) or (B, style_dim). One that has
    `.iterations`, a number of passes, is called with the image of its codes so far as well, see `PSP.encode_delta`.
    """
    return _register(ENCODERS, cls)


def register_generator(cls: ClassT) -> ClassT:
    """Class decorator: makes a generator loadable by its class name. Its interface is that of `Generator`."""
    return _register(GENERATORS, cls)


def register_embedding(cls: ClassT) -> ClassT:
    """Class decorator: makes an embedding loadable by its class name.

    An embedding has `.config` as encoders have, `features(image)` (list of feature maps), and maps images
    (B, 3, H, W) in [-1, 1] to unit vectors (B, D).
    """
    return _register(EMBEDDINGS, cls)

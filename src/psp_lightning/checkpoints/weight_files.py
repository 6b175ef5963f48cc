"""Weight files of ours: networks as self-describing safetensors (see `checkpoints/safetensors_io.py`).

| kind | tensors | description |
|---|---|---|
| `generator` | published layout, `latent_avg` | `generator`: class and arguments |
| `psp` | `encoder.*`, `latent_avg`, and `generator.*` unless another file has it | `psp`: as `PSP.describe()` |
| `embedding` | the network's | `embedding`: class and arguments |

Every description has `origin`: training data, licence and whatever else its writer knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import psp_lightning.models.embedding  # noqa: F401  fills the registry that load_embedding reads
from psp_lightning.checkpoints.safetensors_io import read_described, save_described
from psp_lightning.checkpoints.strict import build_and_load, resolve, understanding
from psp_lightning.models.psp import PSP
from psp_lightning.models.registry import build_described
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate as pretrained

LATENT_SAMPLES, LATENT_SEED = 100_000, 0
COMPUTED = f"mean of {LATENT_SAMPLES} mapped draws, seed {LATENT_SEED}"
GENERATOR = "generator."  # prefix of the generator in a PSP's state dict


def save_generator(
    path: str | os.PathLike[str],
    generator: Generator,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    latent_avg: tuple[Tensor, str] | None = None,
) -> None:
    """Write `generator` as a self-describing safetensors file.

    Stored: the weights in the published layout; `latent_avg`, the mean w of 100,000 draws with a fixed seed unless
    given; size, channels, depth, style_dim, value range, and `origin` (training data, licence, images shown, ...).

    Args:
        origin: plain values; `made_by` (a command) and `licence` become the record of a shipped file.
        dtype: of the stored weights; None keeps theirs.
        latent_avg: (style_dim,) or (n_styles, style_dim) and a few words on where it comes from.

    Raises:
        UserError: a weight that `dtype` cannot hold.
        OSError: the file cannot be written.
    """
    average, made = latent_avg or (generator.latent_average(LATENT_SAMPLES, LATENT_SEED), COMPUTED)
    description = {
        "generator": {"class": type(generator).__name__, **generator.config},
        "value_range": [-1, 1],
        "latent_avg": made,
        "origin": dict(origin or {}),
    }
    save_described(path, "generator", {**generator.state_dict(), "latent_avg": average}, description, dtype)


def read_generator(path: Path) -> tuple[Generator, Tensor | None]:
    """The generator of a file of `save_generator` or of a whole `save_psp`, and its average latent.

    Returns:
        The generator, and latent_avg (style_dim,) or (n_styles, style_dim), or None.

    Raises:
        UserError: the file is damaged, of another kind, or does not fit its description.
    """
    description, tensors = read_described(path, "generator", "psp")
    if description["kind"] == "psp":
        net = _psp(path, description, tensors)
        return net.generator, net.latent_avg  # type: ignore[return-value]
    average = tensors.pop("latent_avg", None)
    with understanding(path):
        node = description.get("generator")
        generator = build_and_load(lambda: build_described("generator", node), tensors, "the described generator")
        if average is not None and average.shape[-1:] != (generator.style_dim,):
            raise UserError(f"its 'latent_avg' does not fit a style of {generator.style_dim} numbers.")
    return generator, average


def save_psp(
    path: str | os.PathLike[str],
    net: PSP,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    generator_file: str | None = None,
) -> None:
    """Write a pSp network as a self-describing safetensors file.

    Args:
        origin: plain values; `made_by` (a command) and `licence` become the record of a shipped file.
        dtype: of the stored weights; None keeps theirs. Running statistics keep theirs in any case.
        generator_file: name of shipped weights, as `toyfaces/generator`, which the file then refers to (with their
            SHA-256) instead of holding the generator; None stores everything.

    Raises:
        UserError: unknown `generator_file`, or not the generator of `net`; a weight that `dtype` cannot hold.
        OSError: the file cannot be written.
    """
    described, tensors = net.describe(), net.state_dict()
    if generator_file is not None:
        file = pretrained.find_shipped(generator_file)
        _check_same(net.generator, read_generator(file)[0], generator_file)
        described["generator"] = {"file": generator_file, "sha256": pretrained.sha256(file)}
        tensors = {name: t for name, t in tensors.items() if not name.startswith(GENERATOR)}
    save_described(path, "psp", tensors, {"psp": described, "origin": dict(origin or {})}, dtype)


def _check_same(own: nn.Module, shipped: nn.Module, name: str) -> None:
    """Raise where the generators differ by more than the rounding to float16."""
    a, b = own.state_dict(), shipped.state_dict()
    same = {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    if not same or not all(torch.allclose(a[k].cpu(), b[k], rtol=1e-3, atol=1e-6) for k in a):
        raise UserError(f"generator_file={name}: that is not the generator of this network; leave it out.")


def read_psp(path: Path) -> PSP:
    """The network of a file of `save_psp`.

    Raises:
        UserError: the file is damaged, of another kind, or does not fit its description; the shipped generator that it
            was made for is not the one of this installation.
    """
    return _psp(path, *read_described(path, "psp"))


def _psp(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PSP:
    with understanding(path):
        described: Any = description.get("psp")
        generator = _named_generator(described.get("generator")) if isinstance(described, Mapping) else None
        missing = [] if generator is None else [GENERATOR + "*"]
        return build_and_load(lambda: PSP.from_description(described, generator), tensors, "PSP", missing)


def _named_generator(node: Any) -> Generator | None:
    """The shipped generator that a description refers to; None where it describes its own."""
    if not isinstance(node, Mapping) or "file" not in node:
        return None
    file = pretrained.find_shipped(str(node["file"]))
    found = pretrained.sha256(file)
    if node.get("sha256") != found:
        raise UserError(
            f"it was made for another {node['file']} (SHA-256 {str(node.get('sha256'))[:16]}...) than the one of this "
            f"installation ({found[:16]}...): take both from the same version of psp-lightning."
        )
    return read_generator(file)[0]


def save_embedding(
    path: str | os.PathLike[str],
    network: nn.Module,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an embedding (see `register_embedding`); arguments and errors as of `save_generator`."""
    described = {"class": type(network).__name__, **network.config}  # type: ignore[dict-item]
    save_described(
        path, "embedding", network.state_dict(), {"embedding": described, "origin": dict(origin or {})}, dtype
    )


def load_embedding(path: str | os.PathLike[str]) -> Any:
    """An embedding in eval mode on the CPU.

    Args:
        path: a file of `save_embedding`, or the name of shipped weights, as `toyfaces/identity`.

    Raises:
        UserError: no such file; it is damaged, of another kind, names a class that is not registered, or does not fit
            its description.
    """
    path = resolve(path)
    description, tensors = read_described(path, "embedding")
    with understanding(path):
        node = description.get("embedding")
        network = build_and_load(lambda: build_described("embedding", node), tensors, "the described embedding")
    return network.eval()

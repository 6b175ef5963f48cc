"""Networks of ours in files: self-describing safetensors (see `checkpoints/safetensors_io.py`) and runs' checkpoints.

| kind | tensors | description |
|---|---|---|
| `generator` | published layout, `latent_avg` | `generator`: class and arguments |
| `psp` | `encoder.*`, `latent_avg`, and `generator.*` unless another file has it | `psp`: as `PSP.describe()` |
| `embedding` | the network's | `embedding`: class and arguments |

Every description has `origin`: training data, licence and whatever else its writer knows. A `save_*` writes a file, a
`restore_*` makes a network of what was read from one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import psp_lightning.models.embedding  # noqa: F401  fills the registry of embeddings
from psp_lightning.checkpoints.read import select, tensors_of
from psp_lightning.checkpoints.safetensors_io import read_described, save_described
from psp_lightning.checkpoints.strict import build_and_load, wrap_errors
from psp_lightning.models.psp import PSP
from psp_lightning.models.registry import build_described
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError, check_tree
from psp_lightning.zoo import locate

LATENT_SAMPLES, LATENT_SEED = 100_000, 0
COMPUTED = f"mean of {LATENT_SAMPLES} mapped draws, seed {LATENT_SEED}"
CHANNELS = ("channel_multiplier", "channel_base", "max_channels", "channels")  # ways to write what the shapes tell
NET, GENERATOR = "net.", "generator."  # prefix of the PSP in a training module, of the generator in a PSP


def save_generator(
    path: str | os.PathLike[str],
    generator: Generator,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    latent_avg: tuple[Tensor, str] | None = None,
) -> None:
    """Write `generator` as a self-describing safetensors file.

    The file holds the weights in the published layout; `latent_avg`, by default the mean w of 100,000 draws with a
    fixed seed; size, channels, depth, style_dim, value range, and `origin`.

    Args:
        path: the file.
        generator: the network.
        origin: plain values, as training data and images shown; `made_by` (a command) and `licence` become the record
            of a shipped file.
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


def save_psp(
    path: str | os.PathLike[str],
    net: PSP,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    generator_file: str | None = None,
) -> None:
    """Write a pSp network as a self-describing safetensors file.

    Args:
        path: the file.
        net: the network.
        origin: as in `save_generator`.
        dtype: of the stored weights; None keeps theirs. Running statistics always keep theirs.
        generator_file: name of shipped weights, as `toyfaces/generator`. The file then refers to them, with their
            SHA-256, and leaves the generator out; None stores everything.

    Raises:
        UserError: unknown `generator_file`, or not the generator of `net`; a weight that `dtype` cannot hold.
        OSError: the file cannot be written.
    """
    described, tensors = net.describe(), net.state_dict()
    if generator_file is not None:
        shipped, digest = _shipped_generator(generator_file)
        _check_same(net.generator, shipped, generator_file)
        described["generator"] = {"file": generator_file, "sha256": digest}
        tensors = {name: t for name, t in tensors.items() if not name.startswith(GENERATOR)}
    save_described(path, "psp", tensors, {"psp": described, "origin": dict(origin or {})}, dtype)


def save_embedding(
    path: str | os.PathLike[str],
    network: nn.Module,
    origin: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an embedding (see `register_embedding`); arguments and errors as in `save_generator`."""
    described = {"class": type(network).__name__, **network.config}  # type: ignore[dict-item]
    facts = {"embedding": described, "origin": dict(origin or {})}
    save_described(path, "embedding", network.state_dict(), facts, dtype)


def restore_generator(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Generator, Tensor | None]:
    """Make the generator of a file of `save_generator` or `save_psp`.

    Args:
        path: the file, for messages.
        description, tensors: what `read_described` gave.

    Returns:
        The generator, and latent_avg (style_dim,) or (n_styles, style_dim), or None.

    Raises:
        UserError: the tensors do not fit the description.
    """
    if description["kind"] == "psp":
        net = restore_psp(path, description, tensors)
        return net.generator, net.latent_avg  # type: ignore[return-value]
    tensors = dict(tensors)
    average = tensors.pop("latent_avg", None)
    with wrap_errors(path):
        node = description.get("generator")
        generator = build_and_load(lambda: build_described("generator", node), tensors, "the described generator")
        if average is not None and average.shape[-1:] != (generator.style_dim,):
            raise UserError(f"its 'latent_avg' does not fit a style of {generator.style_dim} numbers.")
    return generator, average


def restore_psp(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PSP:
    """Make the network of a file of `save_psp`; arguments as in `restore_generator`.

    Raises:
        UserError: the tensors do not fit the description; the shipped generator that the file was made for is not the
            one of this installation.
    """
    with wrap_errors(path):
        described: Any = description.get("psp")
        generator = _named_generator(described.get("generator")) if isinstance(described, Mapping) else None
        missing = [] if generator is None else [GENERATOR + "*"]
        return build_and_load(lambda: PSP.from_description(described, generator), tensors, "PSP", missing)


def restore_trained(content: Mapping[str, Any]) -> PSP:
    """Make the network of a psp-train checkpoint, which `read` gave.

    Raises:
        UserError: its weights do not fit its description.
    """
    check_tree(content["psp"], "description")
    return build_and_load(lambda: PSP.from_description(content["psp"]), trained_state(content), "PSP")


def trained_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of the PSP in a psp-train checkpoint."""
    return select(tensors_of(content), NET)


def restore_embedding(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Make the embedding of a file of `save_embedding`; arguments and errors as in `restore_generator`."""
    with wrap_errors(path):
        node = description.get("embedding")
        return build_and_load(lambda: build_described("embedding", node), tensors, "the described embedding")


def generator_hash(generator: nn.Module) -> str:
    """Return the SHA-256 of what turns a code into an image, 64 hexadecimal digits.

    Hashed, in this order: the class name and the settings that shapes do not tell (`config` without the channel table
    and without None) as JSON with sorted keys; then for each parameter, by name in code-point order, its name and
    shape as JSON and its values rounded to float16 (half to even, -0 as 0), little-endian, in row-major order. Names
    and shapes are those of the state dict. Rounding makes it the same for weights stored as float32 or float16, in
    any file; weights that differ by less are the same generator. Buffers are left out: filters are constants, and the
    noise maps, which some files lack, give texture and no meaning to a code.
    """
    config = {k: v for k, v in generator.config.items() if k not in CHANNELS and v is not None}  # type: ignore[union-attr,operator]
    digest = hashlib.sha256(json.dumps({"class": type(generator).__name__, **config}, sort_keys=True).encode())
    learned = {name for name, _ in generator.named_parameters()}
    for name, tensor in sorted(generator.state_dict().items()):
        if name not in learned:
            continue
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        values = tensor.detach().cpu().float().half() + 0.0  # -0 becomes 0
        digest.update(values.contiguous().numpy().astype("<f2", copy=False).tobytes())
    return digest.hexdigest()


def _named_generator(node: Any) -> Generator | None:
    """Load the shipped generator that a description refers to; None where it describes its own."""
    if not isinstance(node, Mapping) or "file" not in node:
        return None
    generator, found = _shipped_generator(str(node["file"]))
    if node.get("sha256") != found:
        raise UserError(
            f"it was made for another {node['file']} (SHA-256 {str(node.get('sha256'))[:16]}...) than the one of this "
            f"installation ({found[:16]}...): take both from the same version of psp-lightning."
        )
    return generator


def _shipped_generator(name: str) -> tuple[Generator, str]:
    """Load a shipped generator; also its SHA-256."""
    file = locate.find_shipped(name)
    return restore_generator(file, *read_described(file, "generator", "psp"))[0], locate.sha256(file)


def _check_same(own: nn.Module, shipped: nn.Module, name: str) -> None:
    """Raise where the generators differ by more than the rounding to float16."""
    a, b = own.state_dict(), shipped.state_dict()
    same = {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    if not same or not all(torch.allclose(a[k].cpu(), b[k], rtol=1e-3, atol=1e-6) for k in a):
        raise UserError(f"generator_file={name}: that is not the generator of this network; leave it out.")

"""Export networks as ONNX, TorchScript or safetensors, each with a model card.

A copy of the network is traced on the CPU, where the operators of `ops/` are plain PyTorch, so graphs contain only
standard operators, whatever device the network is on. Modulation scales the activations, so weights are constants and
any batch size is possible. The noise is the stored noise maps.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psp_lightning.checkpoints.weight_files import save_generator, save_psp
from psp_lightning.inference.frozen import plain_form
from psp_lightning.inference.model_card import OPSET, PORTS, model_card
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.layers import HalfPrecision, freeze
from psp_lightning.models.psp import PSP
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.names import is_utf8

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}
PARTS = ("encoder", "generator", "both")
NEEDED = ("onnx", "onnxruntime")
TOLERANCE = 1e-3  # absolute for values up to one, otherwise relative to the largest value
TRACED, CHECKED = 2, (1, 3)  # batch sizes


class Sizes(nn.Module):
    """A stand-in for a generator, with nothing but the generator's sizes."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.n_styles, self.style_dim = generator.n_styles, generator.style_dim


class Part(nn.Module):
    """The exported part of a network, in eval mode.

    Args:
        net: the network; its modules are shared.
        what: `encoder`: source (B, C, input_size, input_size) to w_plus (B, n_styles, style_dim), average latent
            included; `generator`: w_plus to image (B, 3, output_size, output_size), not clamped; `both`.

    Raises:
        UserError: `what` includes an encoder and the network has none.
    """

    def __init__(self, net: PSP, what: str) -> None:
        super().__init__()
        if what != "generator" and isinstance(net.encoder, nn.Identity):
            raise UserError(f"what={what} needs an encoder; the checkpoint is only a generator: set what=generator.")
        self.net, self.what = net, what
        if what == "generator":
            self.net = PSP(nn.Identity(), net.generator)
        elif what == "encoder" and not net.passes:  # passes need the generator
            self.net = PSP(net.encoder, Sizes(net.generator), net.latent_avg, net.start_from_latent_avg)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "both":
            return self.net(x)
        return self.net.encode(x) if self.what == "encoder" else self.net.decode(x)


@torch.no_grad()
def example(net: PSP, what: str, batch: int) -> Tensor:
    """Return an example input for a part of `net`; it depends only on the batch size."""
    source = torch.Generator().manual_seed(batch)
    if what == "generator":
        generator: Any = net.generator
        z = torch.randn(batch * net.n_styles, generator.z_dim, generator=source)
        return generator.mapping(z).unflatten(0, (batch, net.n_styles))
    encoder: Any = net.encoder
    return torch.rand(batch, encoder.in_channels, encoder.input_size, encoder.input_size, generator=source)


class FixedShapes(TorchFunctionMode):
    """A mode for tracing in which all sizes except the batch's are constants, without operators that ONNX lacks.

    If a trace computed sizes, the exporter would not know the shapes of filters. Adaptive pooling to a size that does
    not divide the input's size becomes two matrix products. `unflatten` would fix the batch size.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.shape.__get__:  # type: ignore[attr-defined]
            return self._shape(args[0])
        if func is torch.Tensor.unflatten and not kwargs and isinstance(args[1], int):
            x, dim, sizes = args
            shape = self._shape(x)
            dim %= len(shape)
            return x.reshape((*shape[:dim], *sizes, *shape[dim + 1 :]))
        if func is F.adaptive_avg_pool2d:
            return self._pool(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _shape(x: Tensor) -> tuple[Any, ...]:
        shape = x.shape
        return tuple(size if i == 0 and int(size) == TRACED else int(size) for i, size in enumerate(shape))

    def _pool(self, input: Tensor, output_size: Any) -> Tensor:
        height, width = self._shape(input)[-2:]
        rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
        if rows is None or columns is None:
            return F.adaptive_avg_pool2d(input, output_size)
        if height % rows == 0 and width % columns == 0:  # needs no input shape, which ONNX may not know
            return F.avg_pool2d(input, (height // rows, width // columns))
        return averages(height, rows) @ input @ averages(width, columns).t()


def averages(n: int, m: int) -> Tensor:
    """Return the matrix (m, n) of adaptive average pooling from n to m elements."""
    weights = torch.zeros(m, n)
    for i in range(m):
        first, last = i * n // m, -(-(i + 1) * n // m)
        weights[i, first:last] = 1 / (last - first)
    return weights


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    card: Path  # the model card, in the same folder
    difference: float  # largest absolute difference from PyTorch in the checked batches


def check_packages(format: str) -> None:
    """Raise a UserError with an installation command if packages that `format` needs are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise UserError(f"format=onnx needs {' and '.join(missing)}: pip install {' '.join(NEEDED)}")


def export(
    net: PSP, path: str | os.PathLike[str], format: str, what: str = "both", facts: Mapping[str, Any] | None = None
) -> Exported:
    """Export a network, compare the file with PyTorch at batch 1 and 3, and write its model card, PATH.md.

    Args:
        net: the network, on any device, in any precision and mode; it is not changed.
        path: the file to write or replace; if the export or the comparison fails, it is not changed.
        format: `onnx`, `torchscript` or `safetensors` (`save_psp`, `save_generator`).
        what: see `Part`.
        facts: facts for the model card, see `facts_of`.

    Raises:
        UserError: packages are missing, the network cannot be traced, its results differ, or an encoder without
            generator is to be written as safetensors.
        OSError: the file cannot be written.
    """
    check_packages(format)
    if format == "safetensors" and what == "encoder":
        raise UserError("what=encoder cannot be written as safetensors: set what=both, or choose another format.")
    path, facts = Path(path), dict(facts or {})
    card = path.with_name(path.name + ".md")
    if card.is_dir():
        raise UserError(f"{card} is a folder, but the model card is written there. Rename it or choose another file.")
    if format == "onnx" and not is_utf8(path.parent):
        raise UserError(f"{path}: the ONNX exporter needs a folder whose name is UTF-8. Write to another folder.")
    generator = freeze(copy.deepcopy(plain_form(net.generator)))
    net = copy.deepcopy(net, {id(net.generator): generator}).float().cpu()  # the memo puts the plain form in the copy
    for module in net.modules():
        if isinstance(module, HalfPrecision):
            module.half_from = None
    part = Part(net, what)
    with replacing(path) as file:
        if format == "safetensors":
            run = _safetensors(net, what, file, facts)
        else:
            run = (_onnx if format == "onnx" else _torchscript)(part, example(net, what, TRACED), file)
        difference = compare(part, run, [example(net, what, batch) for batch in CHECKED])
    runner = f"onnxruntime {version('onnxruntime')}" if format == "onnx" else "the file, read again,"
    checked = f"{runner} differs from PyTorch {torch.__version__} by at most {difference:.1g} at batch 1 and 3"
    with replacing(card) as file:
        text = model_card(net, what, path, format, checked, facts)
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Exported(path, card, difference)


@torch.no_grad()
def compare(part: Part, run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between the results of `part` and `run` for the inputs.

    Raises:
        UserError: `run` fails, its result has another shape, or it differs by more than 1e-3 (times the largest
            absolute value if that exceeds one).
    """
    worst = 0.0
    for x in inputs:
        batch = len(x)
        expected = part(x)
        try:
            found = run(x)
        except Exception as error:  # the other program may raise anything
            raise UserError(
                f"the exported network fails at batch {batch}, so nothing was written ({_first(error)}). If you use "
                "your own network, check that it does not compute with its batch size."
            ) from None
        fits = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if fits else float("inf")
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            what = f"differs by {difference:.2g}" if fits else f"gives {tuple(found.shape)}"
            raise UserError(
                f"the exported network {what} at batch {batch}, but PyTorch gives {tuple(expected.shape)} and the "
                f"tolerance is {TOLERANCE}; nothing was written."
            )
        worst = max(worst, difference)
    return worst


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _tracing(path: Path) -> Iterator[None]:
    """Trace with fixed shapes and without output; turn any failure into one message."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), FixedShapes():
            warnings.simplefilter("ignore")
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if "write" in str(error).lower() and "fail" in str(error).lower():  # from PyTorch's file writer
            raise OSError(errno.ENOSPC, "cannot be written; the disk is probably full", os.fspath(path)) from error
        raise UserError(f"the network cannot be exported ({type(error).__name__}: {_first(error)}).") from error


def _torchscript(part: Part, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    with _tracing(file):
        traced = torch.jit.trace(part, (x,), check_trace=False)
        with file.open("wb") as stream:  # PyTorch takes only names that are UTF-8
            torch.jit.save(traced, stream)
        with file.open("rb") as stream:
            return torch.jit.load(stream, map_location="cpu")


def _onnx(part: Part, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    source, result = PORTS[part.what]
    with _tracing(file):
        torch.onnx.export(
            part,
            (x,),
            os.fspath(file),
            input_names=[source],
            output_names=[result],
            dynamic_axes={source: {0: "batch"}, result: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,  # the new exporter takes ten times as long, and torch 2.6 needs a matching onnxscript
        )
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {source: x.numpy()})[0])


def _safetensors(net: PSP, what: str, file: Path, facts: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    origin = dict(facts.get("origin", {}))
    if facts.get("checkpoint"):
        origin["exported_from"] = facts["checkpoint"]
    if what == "generator":
        average = (net.latent_avg, "the checkpoint's") if bool(net.latent_avg.any()) else None
        save_generator(file, net.generator, origin, latent_avg=average)  # type: ignore[arg-type]
        return Part(PSP(nn.Identity(), load_generator(file)[0]), "generator")
    save_psp(file, net, origin)
    return Part(load_psp(file), what)

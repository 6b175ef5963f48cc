"""Write networks for other programs: ONNX, TorchScript, or our own safetensors, each with a model card.

A copy on the CPU is traced, where the operators of `ops/` are plain PyTorch, so that a graph has only standard
operators, whatever device the network is on. Modulation scales the activations, so that weights are constants and the
batch stays free; noise is the stored maps.
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
from psp_lightning.inference.frozen import plain_generator
from psp_lightning.inference.model_card import OPSET, PORTS, model_card
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.layers import HalfPrecision
from psp_lightning.models.psp import PSP
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}
PARTS = ("encoder", "generator", "both")
NEEDED = ("onnx", "onnxruntime")
TOLERANCE = 1e-3  # of values up to one; of larger ones relative
TRACED, CHECKED = 2, (1, 3)  # batch sizes


class Sizes(nn.Module):
    """Stands for a generator where only its sizes matter."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.n_styles, self.style_dim = generator.n_styles, generator.style_dim


class Part(nn.Module):
    """The exported half of a network, or the whole, in eval mode.

    Args:
        net: the network; its modules are shared.
        what: `encoder`: source (B, C, input_size, input_size) to w_plus (B, n_styles, style_dim), the average latent
            included; `generator`: w_plus to image (B, 3, output_size, output_size), not clamped; `both`.

    Raises:
        UserError: an encoder is asked of a generator alone.
    """

    def __init__(self, net: PSP, what: str) -> None:
        super().__init__()
        if what != "generator" and isinstance(net.encoder, nn.Identity):
            raise UserError(f"what={what} needs an encoder, and the checkpoint is a generator alone: what=generator.")
        self.net, self.what = net, what
        if what == "generator":
            self.net = PSP(nn.Identity(), net.generator)
        elif what == "encoder" and not net.passes:  # passes take the generator
            self.net = PSP(net.encoder, Sizes(net.generator), net.latent_avg, net.start_from_latent_avg)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.what != "generator":
            x = self.net.encode(x)
        return x if self.what == "encoder" else self.net.decode(x)


@torch.no_grad()
def example(net: PSP, what: str, batch: int) -> Tensor:
    """Return an input of a part of `net`, always the same for a batch size."""
    source = torch.Generator().manual_seed(batch)
    if what == "generator":
        generator: Any = net.generator
        z = torch.randn(batch * net.n_styles, generator.z_dim, generator=source)
        return generator.mapping(z).unflatten(0, (batch, net.n_styles))
    encoder: Any = net.encoder
    return torch.rand(batch, encoder.in_channels, encoder.input_size, encoder.input_size, generator=source)


class FixedShapes(TorchFunctionMode):
    """Trace with every size constant but the batch's, and without what ONNX cannot say.

    Sizes that a trace computes hide from the exporter the shapes of filters; adaptive pooling to a size that does not
    divide the input's becomes the two matrix products that it is; `unflatten` would keep the batch of the example.
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
        if height % rows == 0 and width % columns == 0:  # without the shape of the input, which ONNX may have lost
            return F.avg_pool2d(input, (height // rows, width // columns))
        return averages(height, rows) @ input @ averages(width, columns).t()


def averages(n: int, m: int) -> Tensor:
    """Return the matrix (m, n) of adaptive average pooling from n to m places."""
    weights = torch.zeros(m, n)
    for i in range(m):
        first, last = i * n // m, -(-(i + 1) * n // m)
        weights[i, first:last] = 1 / (last - first)
    return weights


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the file.
        card: its model card, beside it.
        difference: from PyTorch, the largest at any value of the checked batches.
    """

    path: Path
    card: Path
    difference: float


def check_packages(format: str) -> None:
    """Raise a UserError with the command that installs what `format` needs."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if lacking:
        raise UserError(f"format=onnx needs {' and '.join(lacking)}: pip install {' '.join(NEEDED)}")


def export(
    net: PSP, path: str | os.PathLike[str], format: str, what: str = "both", facts: Mapping[str, Any] | None = None
) -> Exported:
    """Write a network, compare it with PyTorch at batch 1 and 3, and write its model card, PATH.md.

    Args:
        net: on any device, of any precision, in any mode; it is not changed.
        path: is replaced; nothing is left there when the export or the comparison fails.
        format: `onnx`, `torchscript` or `safetensors` (`save_psp`, `save_generator`).
        what: see `Part`.
        facts: for the card, see `facts_of`.

    Raises:
        UserError: packages are missing; the network cannot be traced; its results differ; an encoder alone as
            safetensors.
        OSError: the file cannot be written.
    """
    check_packages(format)
    if format == "safetensors" and what == "encoder":
        raise UserError("what=encoder has no safetensors file of its own: take what=both, or another format.")
    path, facts = Path(path), dict(facts or {})
    net = copy.deepcopy(net).float().cpu()
    net.generator = plain_generator(net.generator)
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
    card = path.with_name(path.name + ".md")
    runner = f"onnxruntime {version('onnxruntime')}" if format == "onnx" else "the file, read again,"
    checked = f"{runner} differs from PyTorch {torch.__version__} by at most {difference:.1g} at batch 1 and 3"
    with replacing(card) as file:
        file.write_text(model_card(net, what, path, format, checked, facts), encoding="utf-8")
    return Exported(path, card, difference)


@torch.no_grad()
def compare(part: Part, run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> float:
    """Return the largest difference between what `part` and `run` give for the inputs.

    Raises:
        UserError: more than 1e-3, of values beyond one relative to the largest; or a result of another shape.
    """
    worst = 0.0
    for x in inputs:
        batch = len(x)
        expected = part(x)
        try:
            found = run(x)
        except Exception as error:  # of another program
            raise UserError(
                f"the exported network fails at batch {batch}, nothing was written ({_first(error)}): does an own "
                "network compute with the size of its batch?"
            ) from None
        fits = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if fits else float("inf")
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            what = f"differs by {difference:.2g}" if fits else f"gives {tuple(found.shape)}"
            raise UserError(
                f"the exported network {what} at batch {batch}, where PyTorch gives {tuple(expected.shape)} and "
                f"{TOLERANCE} is allowed; nothing was written."
            )
        worst = max(worst, difference)
    return worst


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _tracing(path: Path) -> Iterator[None]:
    """Trace quietly, with fixed shapes; what goes wrong becomes one message."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), FixedShapes():
            warnings.simplefilter("ignore")
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        full = "write" in str(error).lower() and "fail" in str(error).lower()  # how PyTorch's writer says it
        if full:
            raise OSError(errno.ENOSPC, "cannot be written, the disk is probably full", os.fspath(path)) from error
        raise UserError(f"the network cannot be exported ({type(error).__name__}: {_first(error)}).") from error


def _torchscript(part: Part, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    with _tracing(file):
        torch.jit.save(torch.jit.trace(part, (x,), check_trace=False), file)
        return torch.jit.load(file, map_location="cpu")


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
            dynamo=False,  # the newer exporter takes ten times as long, and in torch 2.6 needs an onnxscript of its age
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

"""The reference implementation of pSp, run unmodified from a clone that the user provides.

Only these parts are replaced, and only at run time:

- without a GPU, the two compiled operations: `upfirdn2d` by the clone's `upfirdn2d_native`, the fused bias and leaky
  ReLU by the same formula in PyTorch. Their autograd functions are unchanged;
- packages that are imported but not needed, if they are not installed;
- weights that would be downloaded: AlexNet and the face network are random, from files that both sides read. The heads
  of LPIPS are the published ones, from the package `lpips`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compare import inputs
from benchmarks.compare.case import Case
from benchmarks.compare.rows import Job

NEEDED = ("models/psp.py", "models/stylegan2/model.py", "training/coach.py", "options/train_options.py")
# modules that the clone imports from each package, and that a comparison does not need
UNUSED = {
    "matplotlib": ("matplotlib", "matplotlib.pyplot"),
    "cv2": ("cv2",),
    "tensorboard": ("torch.utils.tensorboard",),
}
INPUT_SIZE, STYLE_DIM = 256, 512


def missing(clone: Path) -> list[str]:
    """Return the files that a clone of the reference has and this folder lacks."""
    return [name for name in NEEDED if not (clone / name).is_file()]


def fused_bias_act(x: Tensor, bias: Tensor, result: Tensor, act: int, grad: int, slope: float, scale: float) -> Tensor:
    """Compute what the reference uses of the compiled operation: leaky ReLU and its derivative.

    Args:
        x: (B, C, ...).
        bias: (C,), or empty.
        result: the result of the forward pass for the derivative, otherwise empty.
        act: 3, leaky ReLU.
        grad: 0 for the value, 1 for the derivative.
        slope, scale: parameters of the activation.
    """
    assert act == 3 and grad in (0, 1)
    if bias.numel():
        x = x + bias.view(1, -1, *([1] * (x.ndim - 2)))
    if grad == 0:
        return F.leaky_relu(x, slope) * scale
    return torch.where(result > 0, x, x * slope) * scale


@contextlib.contextmanager
def compiled(device: str) -> Iterator[list[str]]:
    """Make the clone's `load` of compiled operations return stand-ins if they cannot be compiled.

    Yields a list of notes, which is complete at the end.
    """
    from torch.utils import cpp_extension

    notes: list[str] = []
    real = cpp_extension.load

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        if device == "cuda":
            try:
                return real(name, *args, **kwargs)
            except Exception as error:  # the build may fail in any way
                last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                notes.append(f"the reference's kernel {name} did not build ({last[0]}); its PyTorch fallback ran")
        return types.SimpleNamespace(fused_bias_act=fused_bias_act)

    with mock.patch.object(cpp_extension, "load", load):
        yield notes


def enter(clone: Path, device: str) -> list[str]:
    """Make the clone's modules importable and its operations usable; return notes for the results."""
    sys.path.insert(0, os.fspath(clone))
    for package, names in UNUSED.items():
        if importlib.util.find_spec(package) is None:
            sys.modules.update({name: mock.MagicMock() for name in names})
    with compiled(device) as notes:
        importlib.import_module("models.stylegan2.op")
    module: Any = sys.modules["models.stylegan2.op.upfirdn2d"]
    if not hasattr(module.upfirdn2d_op, "upfirdn2d"):
        module.F = F  # its fallback uses F without importing it
        module.upfirdn2d_op.upfirdn2d = module.upfirdn2d_native
        if device == "cpu":
            notes.append("the reference's two compiled operations are its own and PyTorch's fallbacks")
    return notes


@contextlib.contextmanager
def no_initialisation() -> Iterator[None]:
    """Leave new layers uninitialised, because their weights are loaded afterwards."""
    nothing = lambda tensor, *args, **kwargs: tensor  # noqa: E731
    names = ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "trunc_normal_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(nn.init, name, nothing))
        yield


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Make `.to("cuda")`, which is hard-coded in the clone, move to `device`."""
    real: Any = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return real(self, *(device if arg == "cuda" else arg for arg in args), **kwargs)

    with mock.patch.object(nn.Module, "to", to):
        yield


def options(job: Job) -> Namespace:
    """Return the clone's training options with the losses of the comparison."""
    from options.train_options import TrainOptions  # type: ignore[import-not-found]

    given = [
        "--output_size", str(job.size), "--start_from_latent_avg", "--lpips_lambda", "0.8", "--l2_lambda", "1",
        "--id_lambda", "0.1", "--w_norm_lambda", "0.005", "--checkpoint_path", job.files["psp"],
    ]  # fmt: skip
    found = TrainOptions().parser.parse_args(given)
    found.device = job.device
    return found


def network(job: Job) -> Any:
    """Build the clone's network with the weights of the comparison."""
    from models.psp import pSp  # type: ignore[import-not-found]

    with no_initialisation():
        return pSp(options(job)).to(job.device)


def write_weights(job: Job) -> None:
    """Write random weights of the published shapes in the layout of the released files to `job.files["psp"]`."""
    from models.psp import pSp

    class Fresh(pSp):
        def load_weights(self) -> None:
            pass

    torch.manual_seed(0)
    net = Fresh(options(job))
    vary(net)
    average = 0.5 * torch.randn(STYLE_DIM)
    content = {
        "state_dict": net.state_dict(),
        "latent_avg": average.repeat(net.opts.n_styles, 1),
        "opts": {
            "encoder_type": "GradualStyleEncoder", "output_size": job.size, "input_nc": 3, "label_nc": 0,
            "start_from_latent_avg": True, "learn_in_w": False, "dataset_type": "ffhq_encode",
        },
    }  # fmt: skip
    torch.save(content, job.files["psp"])


@torch.no_grad()
def vary(net: nn.Module) -> None:
    """Add random values to parameters that start as constants, so that no factor of the computation is 0 or 1."""
    for name, tensor in net.state_dict().items():
        if name.endswith(("bias", "noise.weight", "running_mean")):
            tensor.add_(0.1 * torch.randn_like(tensor))
        elif name.endswith("running_var"):
            tensor.add_(0.1 * torch.randn_like(tensor).abs())


def coach(job: Job) -> Any:
    """Build the clone's trainer with its network, losses and optimizer, but without data sets and log."""
    from training.coach import Coach  # type: ignore[import-not-found]

    net = network(job).train()
    from configs.paths_config import model_paths  # type: ignore[import-not-found]
    from criteria import id_loss, w_norm  # type: ignore[import-not-found]
    from criteria.lpips import networks  # type: ignore[import-not-found]
    from criteria.lpips.lpips import LPIPS  # type: ignore[import-not-found]

    made = Coach.__new__(Coach)
    made.opts, made.device, made.net = net.opts, job.device, net
    made.mse_loss = nn.MSELoss()
    model_paths["ir_se50"] = job.files["ir_se50"]
    with on(job.device), no_initialisation():
        alexnet = networks.models.alexnet()
        alexnet.load_state_dict(torch.load(job.files["alexnet"]))
        heads = torch.load(Path(str(importlib.util.find_spec("lpips").origin)).parent / "weights/v0.1/alex.pth", "cpu")  # type: ignore[union-attr]
        with (
            mock.patch.object(networks.models, "alexnet", lambda pretrained: alexnet),
            mock.patch.object(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: heads),
        ):
            made.lpips_loss = LPIPS(net_type="alex").to(job.device).eval()
        made.id_loss = id_loss.IDLoss().to(job.device).eval()
    made.w_norm_loss = w_norm.WNormLoss(start_from_latent_avg=True)
    made.optimizer = made.configure_optimizers()
    return made


def prepare(job: Job) -> Case:
    """Set up the reference's side of a row as its scripts run it: `inference.py`, `Coach.train`."""
    notes = enter(Path(job.files["clone"]), job.device)
    case = _prepare(job)
    case.notes += notes
    return case


def _prepare(job: Job) -> Case:
    def picture(seed: int) -> Tensor:
        return inputs.images(seed, job.batch, INPUT_SIZE, job.device)

    if job.kind == "weights":
        return Case(lambda seed: None, lambda _: write_weights(job), lambda _: {})
    if job.kind == "train":
        return _training(job)
    net = network(job).eval()
    n_styles, style_dim = net.latent_avg.shape

    def code(seed: int) -> Tensor:
        return inputs.codes(seed, job.batch, n_styles, style_dim, job.device)

    def generate(w_plus: Tensor) -> Tensor:
        image, _ = net.decoder([w_plus], input_is_latent=True, randomize_noise=False)
        return image

    def translate(x: Tensor) -> Tensor:
        return net(x, randomize_noise=False, resize=False)

    choices = {"generator": (code, generate), "encoder": (picture, net.encoder), "image": (picture, translate)}
    draw, run = choices[job.kind]
    run = torch.no_grad()(run)
    return Case(draw, run, lambda x: {"output": run(x).cpu()})


def _training(job: Job) -> Case:
    made = coach(job)

    def loss(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        y = x.clone()  # its data set returns source and target as two tensors
        y_hat, latent = made.net.forward(x, return_latents=True)
        total, parts, _ = made.calc_loss(x, y, y_hat, latent)
        return total, parts

    def run(x: Tensor) -> None:
        made.optimizer.zero_grad()
        total, _ = loss(x)
        total.backward()
        made.optimizer.step()

    def check(x: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)  # for the generator's noise
        total, parts = loss(x)
        total.backward()
        gradient = made.net.encoder.latlayer1.weight.grad.detach().clone().cpu()
        made.optimizer.zero_grad()
        values = {key.removeprefix("loss_"): value for key, value in parts.items() if key.startswith("loss")}
        scalars = {key: torch.tensor(value) for key, value in values.items()}
        return {**scalars, "loss": total.detach().cpu(), "gradient": gradient}

    note = "AlexNet and the face network have random weights, the heads of LPIPS the published ones, on both sides"
    return Case(lambda seed: inputs.images(seed, job.batch, INPUT_SIZE, job.device), run, check, [note])

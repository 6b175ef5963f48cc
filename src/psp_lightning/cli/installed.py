"""psp-doctor without arguments: what is installed, and the command for each optional part that is missing."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from psp_lightning import __version__
from psp_lightning.utils.errors import plural
from psp_lightning.utils.optional import FACENET

REQUIRED = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "torchmetrics",
    "lpips",
    "numpy",
    "pillow",
    "wandb",
)
OPTIONAL = (  # package, what it is for, command
    ("facenet-pytorch", "finds faces; loss.id.backbone=facenet", FACENET),
    ("onnx", "psp-export to ONNX", "pip install 'psp-lightning[export]'"),
    ("onnxruntime", "psp-export checks the ONNX file", "pip install 'psp-lightning[export]'"),
    ("matplotlib", "psp-demo, and the report of psp-evaluate", "pip install 'psp-lightning[demo]'"),
    ("jinja2", "psp-demo, and the report of psp-evaluate", "pip install 'psp-lightning[demo]'"),
    ("tensorboard", "logger=tensorboard", "pip install 'psp-lightning[tensorboard]'"),
    ("torch-fidelity", "metric=[fid,kid]", "pip install torch-fidelity"),
    ("optuna", "hparams_search=optuna", "pip install 'psp-lightning[sweep]'"),
    ("hydra-submitit-launcher", "hydra/launcher=submitit_slurm", "pip install 'psp-lightning[slurm]'"),
    ("hydra-joblib-launcher", "hydra/launcher=joblib", "pip install 'psp-lightning[joblib]'"),
    ("gdown", "psp-weights get from Google Drive", "pip install 'psp-lightning[download]'"),
)
WEIGHTS = ("ir_se50", "alexnet", "moco_v2", "inception_resnet_v1", "stylegan2_ffhq")  # of losses and recipes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _row(name: str, text: str) -> None:
    print(f"{name:<21} {text}")


def print_installed() -> bool:
    """Print packages, devices, weights and tools; return whether every required package is installed."""
    import torch

    from psp_lightning.ops.cuda import toolchain
    from psp_lightning.zoo import locate

    _row("psp_lightning", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    missing = [name for name in REQUIRED if _version(name) is None]
    for name in REQUIRED:
        _row(name, _version(name) or "MISSING: pip install psp-lightning")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    gpus += ["Apple GPU (mps)"] * torch.backends.mps.is_available()
    _row("devices", ", ".join([*gpus, f"CPU, {plural(torch.get_num_threads(), 'thread')}"]))
    home = toolchain.cuda_home()
    nvcc = toolchain.nvcc_version(home) if home else None
    tools = {"nvcc": nvcc, "C++ compiler": toolchain.compiler_version(), "ninja": toolchain.ninja_version()}
    _row("CUDA kernels", "optional; psp-doctor ops says whether they are used. " + "; ".join(
        f"{name}: {value or 'not found'}" for name, value in tools.items()))  # fmt: skip
    print("\noptional packages")
    for name, use, command in OPTIONAL:
        found = _version(name)
        _row(name, f"{found} ({use})" if found else f"missing ({use}): {command}")
    print(f"\npublic weights in {locate.weights_dir()}; psp-weights list shows all")
    for name in WEIGHTS:
        entry = locate.record(name)
        there = (locate.weights_dir() / entry.filename).is_file()
        _row(
            name,
            f"{'there' if there else 'missing'} ({entry.used_by})" + ("" if there else f": psp-weights get {name}"),
        )
    print("\npsp-doctor data [SETTINGS] checks the data of a training")
    return not missing

"""Check the settings of psp-predict before a network is loaded."""

from __future__ import annotations

import math
import os
import shutil

import torch
from omegaconf import DictConfig, ListConfig

from psp_lightning.build.inversion import steps
from psp_lightning.build.photos import check_photo_settings
from psp_lightning.data.masks import SHAPES
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import FORMATS

LARGEST = 8192  # pixels per side; programs that use Pillow would treat a larger picture as an attack
PRECISIONS = ("32-true", "bf16", "bf16-mixed", "16-mixed")
FORMAT_LIMITS = {"jpg": 65500, "webp": 16383}  # pixels per side
SWITCHES = ("side_by_side", "sheet", "overwrite", "any_generator", "fuse", "compile", "cuda_graphs")


def check_settings(cfg: DictConfig) -> None:
    """Raise a UserError for invalid settings."""
    check_photo_settings(cfg)
    choice("format", cfg.format, FORMATS)
    choice("precision", cfg.precision, PRECISIONS)
    for key in SWITCHES:
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]} must be true or false.")
    if cfg.precision == "bf16" and not cfg.fuse:
        raise UserError("precision=bf16 needs fuse=true. For fuse=false, use precision=bf16-mixed.")
    if cfg.cuda_graphs and (cfg.accelerator in ("cpu", "mps") or not torch.cuda.is_available()):
        raise UserError("cuda_graphs=true needs a CUDA device. Leave it out.")
    if cfg.cuda_graphs and (cfg.precision.endswith("-mixed") or cfg.compile):
        raise UserError("cuda_graphs=true needs precision=32-true or bf16, and compile=false.")
    if (cfg.compile or cfg.cuda_graphs) and (used := steps(cfg)):
        raise UserError(f"{'compile' if cfg.compile else 'cuda_graphs'}=true cannot be used with {used[0]}=optimize.")
    if cfg.precision == "16-mixed" and (used := steps(cfg)):
        raise UserError(f"precision=16-mixed is too coarse for the gradients of {used[0]}=optimize. Use bf16-mixed.")
    if cfg.compile and not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        raise UserError("compile=true needs a C++ compiler. Install g++, or set CXX to a compiler.")
    if cfg.latents not in (True, False, "safetensors"):
        npz = " Version 0.1.0 also wrote npz; these files can still be read." if cfg.latents == "npz" else ""
        raise UserError(f"latents={cfg.latents} must be true, false or safetensors.{npz}")
    if not isinstance(cfg.mix.latent_mask, ListConfig | None):
        raise UserError(f"mix.latent_mask={cfg.mix.latent_mask} must be a list, e.g. [{cfg.mix.latent_mask}].")
    if cfg.mask.kind is not None:
        choice("mask.kind", cfg.mask.kind, SHAPES)
    for key, low, high in (("batch_size", 1, math.inf), ("num_workers", 0, 1024), ("seed", 0, math.inf)):
        cfg[key] = whole(key, cfg[key], low, high)
    cfg.resize = whole("resize", cfg.resize, 1, LARGEST, optional=True)
    cfg.factor = whole("factor", cfg.factor, 1, 2**15, optional=True)
    cfg.mix.n_outputs = whole("mix.n_outputs", cfg.mix.n_outputs, 1)
    cfg.mix.seed = whole("mix.seed", cfg.mix.seed, 0)
    number("mix.alpha", cfg.mix.alpha)


def check_width(cfg: DictConfig, output_size: int) -> None:
    """Raise a UserError if the images of `side_by_side` are wider than their format allows."""
    size = cfg.resize or output_size
    width, limit = size * (1 + cfg.mix.n_outputs), FORMAT_LIMITS.get(cfg.format, math.inf)
    if cfg.side_by_side and width > limit:
        raise UserError(
            f"side_by_side=true needs images that are {width} pixels wide, but format={cfg.format} allows {limit}. Use "
            "format=png, a smaller resize or fewer outputs."
        )

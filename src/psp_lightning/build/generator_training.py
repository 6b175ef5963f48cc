"""Build the objects of a generator's training from its configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from psp_lightning.build.instantiate import instantiate, naming
from psp_lightning.build.trainer import Training, build_trainer, prepare, read_resumed
from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.data.datamodules import ImageDataModule
from psp_lightning.lit.callbacks import Forecast
from psp_lightning.lit.distributed import UnwrappedDDP
from psp_lightning.lit.generator import LitGenerator, Recipe
from psp_lightning.loading import load_generator, restore_any_generator
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.arguments import choice, whole
from psp_lightning.utils.errors import UserError

SHAPE = ("output_size", "style_dim", "z_dim", "n_mapping")
UNSUPPORTED = {
    "precision": " model.half=bfloat16 runs the highest resolutions in half precision.",
    "accumulate_grad_batches": " Lower data.batch_size and adapt optimizer.lr and model.r1_gamma.",
    "gradient_clip_val": "",
    "max_epochs": " trainer.max_steps sets the length.",
    "val_every": " There is no validation.",
}
ADVICE = "network=toyfaces, a smaller domain.size or fewer trainer.max_steps take less; other networks need a GPU."
HALF = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_generator_training(cfg: DictConfig, resume: Path | None = None) -> Training:
    """Build trainer, module and data of a run, which may resume from the checkpoint `resume`.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    _check_groups(cfg)
    prepare(cfg)
    images = instantiate(cfg, "data.images", "domain", "data")
    size = images.size
    batch = max(4, min(32, 4096 // size)) if cfg.data.batch_size is None else cfg.data.batch_size
    with naming(cfg, "data"):
        data = ImageDataModule(images, batch, cfg.data.num_workers, cfg.seed)
    model: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    dtype = HALF[choice("model.half", model.pop("half"), HALF)]
    half_blocks = whole("model.half_blocks", model.pop("half_blocks"), 1, 16)
    with naming(cfg, "model"):
        recipe = Recipe(**model)
    generator, discriminator = build_networks(cfg, size)
    if dtype is not None:
        for network in (generator, discriminator):
            network.use_half(max(8, size >> (half_blocks - 1)), dtype)
    with naming(cfg, "optimizer"):
        module = LitGenerator(
            generator,
            discriminator,
            lr=(0.002 if size >= 1024 else 0.0025) if cfg.optimizer.lr is None else cfg.optimizer.lr,
            betas=tuple(cfg.optimizer.betas),
            recipe=recipe,
            seed=cfg.seed,
            log_every=cfg.trainer.log_every_n_steps,
        )
    checkpoint = read_resumed(resume, "generator", "psp-train-generator")
    if checkpoint is None and cfg.init_from is not None:
        _start_from(module, str(cfg.init_from))
    trainer = build_trainer(cfg, [Forecast(ADVICE)], UnwrappedDDP(), checkpoint, limit_val_batches=0)
    return Training(trainer, module, data, None if checkpoint is None else checkpoint["global_step"])


def build_networks(cfg: DictConfig, size: int) -> tuple[Generator, Discriminator]:
    """Build generator and discriminator for images of `size` pixels.

    Raises:
        UserError: a setting is invalid.
    """
    limits = {"channel_base": (8, math.inf), "n_mapping": (1, 64)}
    net = {
        key: whole(f"network.{key}", value, *limits.get(key, (1, math.inf)), optional=key == "channel_base")
        for key, value in cfg.network.items()
    }
    group, channel_base = net.pop("minibatch_group"), net.pop("channel_base") or (16384 if size < 512 else 32768)
    with naming(cfg, "network"):
        generator = Generator(size, channel_multiplier=1, channel_base=channel_base, **net)
        discriminator = Discriminator(size, channel_base, net["max_channels"], group=group)
    for network in (generator, discriminator):  # faster on CPUs, and on GPUs in half precision
        network.to(memory_format=torch.channels_last)
    return generator, discriminator


def _start_from(module: LitGenerator, path: str) -> None:
    """Load initial weights: all networks from a run, or generator and average from a generator file.

    Raises:
        UserError: the file contains no such networks, or their shapes differ.
    """
    folder = Path(path).is_dir()
    file = Path(path) / "checkpoints" / "last.ckpt" if folder else Path(path)
    content = read(file) if file.suffix == ".ckpt" and file.is_file() else None
    if content is not None and {"generator", "state_dict"} <= content.keys():
        try:
            module.load_weights(content["state_dict"])
        except UserError as error:
            raise UserError(f"init_from={path}: {error}") from None
        return
    if content is None or folder:  # a folder may contain a better file than last.ckpt
        start, _ = load_generator(path)
    else:
        start, _ = restore_any_generator(file, None, content)
    mine = module.generator
    differing = [key for key in SHAPE if start.config.get(key) != mine.config.get(key)]
    widths = {key: value.shape for key, value in start.state_dict().items()}
    if differing or widths != {key: value.shape for key, value in mine.state_dict().items()}:
        found = ", ".join(f"{key} {start.config[key]} instead of {mine.config[key]}" for key in differing)
        raise UserError(
            f"init_from={path} is a generator of another shape ({found or 'other channels'}). Set domain.size and "
            "network.* to its shape."
        )
    load_strict(mine, start.state_dict(), what=f"the generator of init_from={path}")
    module.g_ema.load_state_dict(mine.state_dict())


def _check_groups(cfg: DictConfig) -> None:
    """Raise a UserError for options of psp-train that are on the search path but do not apply here."""
    if "network" not in cfg or "images" not in (cfg.get("data") or {}):
        raise UserError("domain and data of psp-train do not fit a generator. Choose from: domain=folder, toyfaces")
    if unknown := sorted(set(cfg.optimizer) - {"lr", "betas"}):
        raise UserError(f"optimizer.{unknown[-1]}: generators train with Adam; set only optimizer.lr and .betas.")
    for key in sorted(set(cfg.trainer) & UNSUPPORTED.keys()):
        raise UserError(f"trainer.{key} does not apply to the training of a generator.{UNSUPPORTED[key]}")
    if cfg.trainer.strategy not in ("auto", "ddp"):
        raise UserError(f"trainer.strategy={cfg.trainer.strategy}: generators train with auto or ddp.")

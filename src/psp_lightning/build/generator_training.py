"""Configuration to the objects of a generator's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from psp_lightning.build.checks import check_numbers
from psp_lightning.build.training import build_loggers, import_plugins, instantiate, quiet
from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.data.datamodules import ImageDataModule
from psp_lightning.lit.callbacks.epochs import EpochStart
from psp_lightning.lit.callbacks.fit import LastCheckpoint, ProgressBar
from psp_lightning.lit.callbacks.samples import ExportGenerator, SampleGrids
from psp_lightning.lit.files import AtomicCheckpointIO
from psp_lightning.lit.generator import LitGenerator, Recipe
from psp_lightning.lit.strategy import UnwrappedDDP
from psp_lightning.loading import load_generator
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.devices import check_launched, resolve_devices
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory

INF = float("inf")
NUMBERS: dict[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**32 - 1),
    "optimizer.lr": (float, 0, INF),
    "trainer.max_steps": (int, 1, INF),
    "trainer.log_every_n_steps": (int, 1, INF),
    "domain.size": (int, 8, 65536),
    "data.batch_size": (int, 1, INF),
    "data.num_workers": (int, 0, 1024),
    "data.limit": (int, 1, INF),
    "callbacks.last.every_n_steps": (int, 1, INF),
    "callbacks.export.every_n_steps": (int, 1, INF),
    "callbacks.images.every_n_steps": (int, 0, INF),
    "callbacks.images.n_images": (int, 1, 4096),
    "callbacks.images.truncation": (float, 0, 10),
    "network.style_dim": (int, 1, INF),
    "network.z_dim": (int, 1, INF),
    "network.n_mapping": (int, 1, 64),
    "network.channel_base": (int, 8, INF),
    "network.max_channels": (int, 1, INF),
    "network.minibatch_group": (int, 1, INF),
    "model.r1_gamma": (float, 0, INF),
    "model.r1_every": (int, 0, INF),
    "model.path_weight": (float, 0, INF),
    "model.path_every": (int, 0, INF),
    "model.path_shrink": (int, 1, INF),
    "model.mixing": (float, 0, 1),
    "model.ema_images": (float, 0, INF),
    "model.ema_ramp": (float, 0, INF),
    "model.augment_p": (float, 0, 1),
    "model.ada_target": (float, -1, 1),
    "model.ada_images": (float, 1, INF),
    "model.ada_every": (int, 1, INF),
    "model.path_decay": (float, 0, 1),
    "model.half_blocks": (int, 1, 16),
}
SHAPE = ("output_size", "style_dim", "z_dim", "n_mapping")
REFUSED = {
    "precision": ": model.half=bfloat16 runs the highest resolutions in half precision",
    "accumulate_grad_batches": ": lower data.batch_size and set optimizer.lr and model.r1_gamma for it",
    "gradient_clip_val": "",
    "max_epochs": ": trainer.max_steps says how long",
    "val_every": ": it has no validation",
}
HALF = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class GeneratorTraining:
    """Everything that the training of a generator needs."""

    trainer: pl.Trainer
    module: LitGenerator
    data: ImageDataModule
    resume_step: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C or SIGTERM ended the fit."""
        return any(c.interrupted for c in self.trainer.callbacks if isinstance(c, LastCheckpoint))  # type: ignore[attr-defined]


def build_networks(cfg: DictConfig, size: int) -> tuple[Generator, Discriminator]:
    """Generator and discriminator for images of `size`.

    Raises:
        UserError: settings that no network can have.
    """
    net = cfg.network
    base = net.channel_base or (16384 if size < 512 else 32768)
    generator = Generator(
        size,
        style_dim=net.style_dim,
        n_mapping=net.n_mapping,
        channel_multiplier=1,
        max_channels=net.max_channels,
        z_dim=net.z_dim,
        channel_base=base,
    )
    discriminator = Discriminator(size, base, net.max_channels, group=net.minibatch_group)
    if cfg.model.half not in HALF:
        raise UserError(f"model.half={cfg.model.half} is unknown. Choose from: {', '.join(HALF)}")
    if (dtype := HALF[cfg.model.half]) is not None:
        for network in (generator, discriminator):
            network.use_half(max(8, size >> (cfg.model.half_blocks - 1)), dtype)
    return generator, discriminator


def _checkpoint_of(path: str) -> dict[str, Any] | None:
    """The content of a checkpoint that psp-train-generator wrote, or None: another kind of file."""
    place = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    if place.suffix != ".ckpt" or not place.is_file():
        return None
    content = read(place)
    return content if _is_of_a_generator(content) else None


def _is_of_a_generator(content: Mapping[str, Any]) -> bool:
    return {"generator", "state_dict"} <= content.keys() and "psp" not in content


def _start_from(module: LitGenerator, path: str) -> None:
    """First weights: all networks of a run, or a generator for generator and average.

    Raises:
        UserError: the file holds networks of another shape, or none.
    """
    if (content := _checkpoint_of(path)) is not None:
        try:
            module.load_weights(content["state_dict"])
        except UserError as error:
            raise UserError(f"init_from={path}: {error}") from None
        return
    place = Path(path) / "generator.safetensors"
    start, _ = load_generator(place if place.is_file() else path)
    mine = module.generator
    differing = [key for key in SHAPE if start.config.get(key) != mine.config.get(key)]
    widths = {key: value.shape for key, value in start.state_dict().items()}
    if differing or widths != {key: value.shape for key, value in mine.state_dict().items()}:
        said = ", ".join(f"{key} {start.config[key]} instead of {mine.config[key]}" for key in differing)
        raise UserError(
            f"init_from={path} is a generator of another shape ({said or 'other channels'}); set domain.size and "
            "network.* to its own."
        )
    load_strict(mine, start.state_dict(), what=f"the generator of init_from={path}")
    module.average.load_state_dict(mine.state_dict())


def _check_groups(cfg: DictConfig) -> None:
    """Refuse options of psp-train's groups, which the search path makes available, where they make no sense here.

    Raises:
        UserError: naming the group and its options.
    """
    if "network" not in cfg or "images" not in (cfg.get("data") or {}):
        raise UserError("domain and data of psp-train do not train a generator. Choose from: domain=folder, toyfaces")
    if unknown := sorted(set(cfg.optimizer) - {"lr", "betas"}):
        raise UserError(f"optimizer.{unknown[-1]}: a generator trains with Adam, which has optimizer.lr and .betas.")
    betas = list(cfg.optimizer.betas)
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={betas} must be two numbers from 0 to below 1.")
    for key in sorted(set(cfg.trainer) & REFUSED.keys()):
        raise UserError(f"trainer.{key} is not for the training of a generator{REFUSED[key]}.")
    known = {field.name for field in fields(Recipe)} | {"half", "half_blocks"}
    for key in cfg.model:
        if key not in known:
            raise UserError(
                f"there is no setting model.{key}.{suggest(str(key), sorted(known))} All: {', '.join(sorted(known))}"
            )


def build_generator_training(cfg: DictConfig, resume: Path | None = None) -> GeneratorTraining:
    """Trainer, module and data of a run.

    Args:
        cfg: the composed configuration.
        resume: the checkpoint that the run will continue from.

    Raises:
        UserError: whatever in the configuration or the data a person can mend.
    """
    quiet()
    _check_groups(cfg)
    check_numbers(cfg, NUMBERS)
    if cfg.trainer.max_steps is None:
        raise UserError("trainer.max_steps must be given: the number of steps.")
    import_plugins(cfg.plugins)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    images = instantiate(cfg.data.images, "data.images")
    size = images.size
    batch = cfg.data.batch_size or max(4, min(32, 4096 // size))
    data = ImageDataModule(images, batch, cfg.data.num_workers, cfg.seed)
    generator, discriminator = build_networks(cfg, size)
    for network in (generator, discriminator):  # convolutions run faster so, on CPUs and on GPUs in half precision
        network.to(memory_format=torch.channels_last)
    model: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[assignment]
    recipe = Recipe(**{key: value for key, value in model.items() if key not in ("half", "half_blocks")})
    module = LitGenerator(
        generator,
        discriminator,
        lr=(0.002 if size >= 1024 else 0.0025) if cfg.optimizer.lr is None else cfg.optimizer.lr,
        betas=tuple(cfg.optimizer.betas),
        recipe=recipe,
        seed=cfg.seed,
        log_every=cfg.trainer.log_every_n_steps,
    )
    step = None
    if resume is not None:
        content = read(resume)
        if not _is_of_a_generator(content):
            raise UserError(f"{resume} is no checkpoint of psp-train-generator.")
        step = int(content.get("global_step", 0))
    elif cfg.init_from is not None:
        _start_from(module, str(cfg.init_from))
    return GeneratorTraining(_trainer(cfg, step), module, data, step or 0)


def _trainer(cfg: DictConfig, resume_step: int | None) -> pl.Trainer:
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    strategy = options.pop("strategy")
    options["accelerator"], devices = resolve_devices(options["accelerator"], options["devices"])
    options["devices"] = devices
    if computes_on_cpu(options["accelerator"]):
        keep_freed_memory()
    world = (devices if isinstance(devices, int) else len(devices)) * options["num_nodes"]
    local = len(devices) if isinstance(devices, list) else devices
    check_launched(local)
    if strategy not in ("auto", "ddp"):
        raise UserError(f"trainer.strategy={strategy}: a generator trains with auto or ddp.")
    try:
        return pl.Trainer(
            **options,
            strategy=UnwrappedDDP() if world > 1 else "auto",
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module shards
            default_root_dir=cfg.paths.output_dir,
            callbacks=_callbacks(cfg),
            logger=build_loggers(cfg, resume_step),
            plugins=[AtomicCheckpointIO()],
            enable_model_summary=False,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def _callbacks(cfg: DictConfig) -> list[Callback]:
    run, settings = Path(cfg.paths.output_dir), cfg.callbacks
    callbacks: list[Callback] = [EpochStart()]
    if settings.get("images"):
        images = settings.images
        callbacks.append(SampleGrids(run / "images", images.every_n_steps, images.n_images, images.truncation))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(refresh_rate=1))
    for key, node in settings.items():
        if "_target_" in (node or {}):
            callbacks.append(instantiate(node, f"callbacks.{key}"))
    origin = {"data": cfg.data.name, "licence": cfg.data.get("licence"), "seed": cfg.seed}
    callbacks.append(ExportGenerator(run, settings.export.every_n_steps if settings.get("export") else None, origin))
    callbacks.append(LastCheckpoint(run / "checkpoints", settings.last.every_n_steps if settings.get("last") else None))
    return callbacks

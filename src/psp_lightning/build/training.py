"""Configuration to objects: the only caller of `hydra.utils.instantiate`."""

from __future__ import annotations

import importlib
import inspect
import logging
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from psp_lightning.build.checks import NUMBERS, check_monitored, check_numbers
from psp_lightning.inference.frozen import AUTOCAST, freeze_psp_generator
from psp_lightning.lit.callbacks.epochs import EpochStart
from psp_lightning.lit.callbacks.fit import AverageBatchNorm, ImageGrids, LastCheckpoint, ProgressBar
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.lit.psp import LitPSP
from psp_lightning.loading import LoadReport, load_psp, load_strict, read
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.metrics.images import MSE, PSNR, IdSimilarity
from psp_lightning.models.checkpointing import checkpoint_units
from psp_lightning.models.psp import PSP
from psp_lightning.utils.devices import check_launched, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory
from psp_lightning.zoo.locate import find

log = logging.getLogger(__name__)


@dataclass
class Training:
    """Everything that a training run needs."""

    trainer: pl.Trainer
    module: LitPSP
    data: pl.LightningDataModule
    untrained_generator: bool = False
    resume_step: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether ctrl-C or SIGTERM ended the fit."""
        return any(c.interrupted for c in self.trainer.callbacks if isinstance(c, LastCheckpoint))  # type: ignore[attr-defined]


def instantiate(node: Any, where: str, **kwargs: Any) -> Any:
    """Build the object of one configuration node.

    Args:
        node: a mapping with `_target_`.
        where: the node's key, for messages.
        **kwargs: further arguments of the target.

    Raises:
        UserError: no `_target_`; a target that does not exist or does not take an argument of the node.
    """
    if not isinstance(node, Mapping | DictConfig) or "_target_" not in node:
        raise UserError(f"{where} has no _target_: choose an option of its group, e.g. {where.split('.')[0]}=NAME.")
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **kwargs)
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ImportError | AttributeError | None):
            raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
        raise


def quiet() -> None:
    """Leave out what Lightning says that does not concern a user of this library."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # its import has set them to INFO: tips, device counts
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Found .* in eval mode at the start",  # the frozen networks are meant to be
        ".*does not have many workers.*",  # data.num_workers is a setting, and drawn faces need none
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # the values are gathered already
        ".*broadcast_buffers.*",
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own
    ):
        warnings.filterwarnings("ignore", message)


def import_plugins(names: list[str]) -> None:
    """Import the user's own modules, which register their encoders, losses and tasks.

    Raises:
        UserError: a module that cannot be found.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: no module '{name}' ({error}); is its folder in PYTHONPATH?") from None


def build_data(cfg: DictConfig) -> Any:
    """The task's data module over the stores of the domain."""
    data = cfg.data
    make = instantiate(cfg.task.datamodule, "task.datamodule")
    return make(
        train=instantiate(data.train, "data.train"),
        val=instantiate(data.val, "data.val"),
        input_size=cfg.domain.input_size,
        target_size=cfg.domain.target_size,
        batch_size=data.batch_size,
        val_batch_size=data.val_batch_size,
        num_workers=data.num_workers,
        seed=data.seed,
        flip=data.flip,
    )


def build_net(cfg: DictConfig, source: dict[str, Any], in_channels: int) -> PSP:
    """Encoder and generator, with `n_styles`, `style_dim` and `in_channels` derived."""
    made = instantiate(cfg.generator, "generator")
    generator, latent_avg = made if isinstance(made, tuple) else (made, None)
    if latent_avg is None:
        latent_avg = generator.latent_average(n=cfg.model.latent_avg_samples)
    derived = {
        "n_styles": generator.n_styles,
        "style_dim": generator.style_dim,
        "in_channels": in_channels,
        "input_size": cfg.domain.input_size,
    }
    make = instantiate(cfg.encoder, "encoder")
    if "n_styles" not in inspect.signature(make.func).parameters:
        del derived["n_styles"]  # an encoder into W has one style
    encoder = make(**derived)
    net = PSP(encoder, generator, latent_avg, start_from_latent_avg=cfg.model.start_from_latent_avg, source=source)
    if cfg.model.backbone is not None:
        log.info("%s", load_backbone(net.encoder, cfg.model.backbone))
    if cfg.init_from is not None:
        log.info("%s", load_strict(net, load_psp(cfg.init_from).state_dict(), what=f"init_from={cfg.init_from}"))
    if cfg.model.checkpointing:
        if cfg.model.compile:
            raise UserError("model.checkpointing=true does not go with model.compile=true: leave one of them out.")
        checkpoint_units(net.encoder)
    if cfg.model.compile:
        net.encoder.compile()  # in place: the keys of the state dict stay clean
    return freeze_psp_generator(net, AUTOCAST.get(cfg.trainer.precision))


def load_backbone(encoder: torch.nn.Module, name: str) -> LoadReport:
    """Start the encoder's backbone from the face recognition network, as the paper does.

    Args:
        encoder: with the layers of IR-SE50.
        name: `ir_se50` (in the weights folder), or the file.

    Raises:
        UserError: the file is missing or of another network.

    Source: pSp's training code; with other than three input channels its first layer keeps its random weights. Weights
    for an image beside the source (ReStyle) start at zero.
    """
    state = read(find(name) if name == "ir_se50" else name)
    shared: tuple[str, ...] = ("body.", "input_layer.")
    if encoder.in_channels != 3:
        shared = ("body.",)
        state = {key: value for key, value in state.items() if not key.startswith("input_layer.")}
    own = [key for key in encoder.state_dict() if not key.startswith(shared)]
    adapt = ["input_layer.0.weight"]
    return load_strict(encoder, state, own, ["output_layer.*"], "backbone of the encoder", adapt)


def build_losses(cfg: DictConfig) -> CompositeLoss:
    """The selected loss terms with their weights.

    Raises:
        UserError: an entry without `_target_` (a weight without its term), an unknown name, missing weights.
    """
    terms, weights = {}, {}
    if not cfg.get("loss"):
        raise UserError("no loss is selected: choose at least one, e.g. loss=[l2].")
    for name, node in cfg.loss.items():
        if "_target_" not in node:
            raise UserError(
                f"loss.{name} is set but the term '{name}' is not selected: "
                f"add it to the list, loss=[...,{name}] (its file is conf/loss/{name}.yaml)."
            )
        plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
        weights[str(name)] = plain.pop("weight", 1.0)
        terms[str(name)] = instantiate(plain, f"loss.{name}")
    return CompositeLoss(terms, weights)


def build_module(cfg: DictConfig, data: Any) -> LitPSP:
    """The LightningModule of a run."""
    source = {**data.spec.to_dict(), "size": cfg.domain.input_size}
    losses = build_losses(cfg)
    metrics: dict[str, Any] = {"mse": MSE(), "psnr": PSNR()}
    if "id" in losses.terms:
        metrics["id_similarity"] = IdSimilarity(losses.terms["id"].similarity)  # type: ignore[arg-type]
    module = LitPSP(
        build_net(cfg, source, data.spec.channels),
        losses,
        instantiate(cfg.optimizer, "optimizer"),
        metrics=metrics,
        noise=cfg.model.noise,
        batch_norm=cfg.model.batch_norm,
        warmup_steps=cfg.model.warmup_steps,
        decay_steps=cfg.model.decay_steps,
        total_steps=cfg.trainer.max_steps,
        log_every=cfg.trainer.log_every_n_steps,
        source_is_target=getattr(data, "source_is_target", False),
    )
    return module.to(memory_format=torch.channels_last)  # in which convolutions run faster


def build_trainer(cfg: DictConfig, spec: Any, resume_step: int | None) -> pl.Trainer:
    """The Trainer with callbacks, loggers, strategy."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    val_every = options.pop("val_every")
    strategy = options.pop("strategy")
    options["accelerator"], devices = resolve_devices(options["accelerator"], options["devices"])
    options["devices"] = devices
    if computes_on_cpu(options["accelerator"]):
        keep_freed_memory()
    local = devices if isinstance(devices, int) else len(devices)
    check_launched(local)
    world = local * options["num_nodes"]
    cuda = torch.cuda.is_available() and options["accelerator"] in ("auto", "gpu", "cuda")
    if strategy in ("auto", "ddp"):
        # the encoder's buffers agree under SyncBatchNorm; sending them before each forward would hang a validation in
        # which ranks have unequal numbers of batches
        strategy = DDPStrategy(broadcast_buffers=False) if world > 1 else "auto"
    try:
        return pl.Trainer(
            **options,
            strategy=strategy,
            sync_batchnorm=world > 1 and cuda and cfg.model.batch_norm == "sync",  # exists on GPUs only
            max_epochs=-1,
            val_check_interval=val_every * options["accumulate_grad_batches"],
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module shards
            default_root_dir=cfg.paths.output_dir,
            callbacks=build_callbacks(cfg, spec),
            logger=build_loggers(cfg, resume_step),
            plugins=[AtomicCheckpointIO()],
            enable_model_summary=False,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from error


def build_callbacks(cfg: DictConfig, spec: Any) -> list[Callback]:
    """Image grids, progress bar, checkpoints; the last checkpoint comes last, so that it holds the others' state."""
    run, settings = Path(cfg.paths.output_dir), cfg.callbacks
    folder = run / "checkpoints"
    callbacks: list[Callback] = [AverageBatchNorm(), EpochStart()]
    if settings.get("images"):
        callbacks.append(ImageGrids(run / "images", spec, settings.images.every_n_steps, settings.images.n_images))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar(refresh_rate=1))
    for key, node in settings.items():
        if "_target_" in (node or {}):
            callbacks.append(instantiate(node, f"callbacks.{key}"))
    if settings.get("best"):
        best = dict(monitor=settings.best.monitor, mode=settings.best.mode, save_top_k=1)
        callbacks.append(ModelCheckpoint(folder, "best", enable_version_counter=False, **best))
    if settings.get("every") and settings.every.every_n_steps:
        every = ModelCheckpoint(
            folder, "step_{step:08d}", auto_insert_metric_name=False, save_top_k=-1,
            every_n_train_steps=settings.every.every_n_steps,
        )  # fmt: skip
        callbacks.append(every)
    callbacks.append(LastCheckpoint(folder, settings.last.every_n_steps if settings.get("last") else None))
    return callbacks


def build_loggers(cfg: DictConfig, resume_step: int | None) -> list[Logger]:
    """The selected loggers; a resumed run goes on in its own files and in its own wandb run."""
    run = Path(cfg.paths.output_dir)
    loggers: list[Logger] = []
    for name, node in (cfg.logger or {}).items():
        if name == "csv":
            loggers.append(CsvLog(run / "csv", resume_step))
        elif name == "wandb":
            identity = run / "wandb_id"
            if not identity.exists():
                run.mkdir(parents=True, exist_ok=True)
                identity.write_text(secrets.token_hex(4))
            loggers.append(instantiate(node, "logger.wandb", id=identity.read_text(), resume="allow"))
            _open_wandb(loggers[-1])
        else:
            loggers.append(instantiate(node, f"logger.{name}"))
    return loggers


def _open_wandb(logger: Any) -> None:
    from wandb.errors import Error

    try:
        _ = logger.experiment
    except Error as error:
        raise UserError(f"wandb: {error} Log in with `wandb login`, or set logger.wandb.offline=true.") from None


def build_training(cfg: DictConfig, resume: Path | None = None) -> Training:
    """Trainer, module and data of a run.

    Args:
        cfg: the composed configuration.
        resume: the checkpoint that the run will continue from, already read once.

    Raises:
        UserError: whatever in the configuration or the data a person can mend.
    """
    quiet()
    check_numbers(cfg, NUMBERS)
    import_plugins(cfg.plugins)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    module = build_module(cfg, data)
    check_monitored(cfg, module)
    step = None
    if resume is not None:
        step = int(read(resume).get("global_step", 0))
    untrained = str(cfg.generator.get("_target_", "")).endswith("Generator.seeded") and cfg.init_from is None
    return Training(build_trainer(cfg, data.spec, step), module, data, untrained, step or 0)

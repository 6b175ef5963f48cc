"""Build the objects of an encoder's training from its configuration."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import DDPStrategy

from psp_lightning.build.instantiate import instantiate, naming
from psp_lightning.build.trainer import Training, build_trainer, prepare, read_resumed
from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import LoadReport, load_strict
from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.data.datamodules import TaskDataModule
from psp_lightning.inference.frozen import autocast_dtype, freeze_psp_generator
from psp_lightning.lit.callbacks import AverageBatchNorm, Forecast
from psp_lightning.lit.distributed import MachineBatchNorm
from psp_lightning.lit.e4e import LitE4E
from psp_lightning.lit.generated import Drawing
from psp_lightning.lit.psp import LitPSP
from psp_lightning.loading import load_psp
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.metrics.images import ImageMean
from psp_lightning.models.checkpointing import checkpoint_units
from psp_lightning.models.layers import freeze
from psp_lightning.models.psp import PSP
from psp_lightning.utils.arguments import choice, whole
from psp_lightning.utils.devices import count_devices
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.memory import computes_on_cpu
from psp_lightning.zoo.locate import find

log = logging.getLogger(__name__)
TOY_NETWORK = "toyfaces/identity"

# Minimum number of channels for training an encoder in channels_last. With fewer, the gradient of a strided 1x1
# convolution writes outside its memory in that format (oneDNN in torch 2.15, in_channels of 2 and 4, batch size 2).
WIDE = 8

ADVICE = "encoder=gradual_small, smaller domain.input_size and .target_size, or fewer trainer.max_steps take less."


def build_training(cfg: DictConfig, resume: Path | None = None) -> Training:
    """Build trainer, module and data of a run, which may resume from the checkpoint `resume`.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    prepare(cfg)
    data = build_data(cfg)
    module = build_module(cfg, data)
    check_monitored(cfg, module, data)
    checkpoint = read_resumed(resume, "psp", "psp-train")
    # SyncBatchNorm keeps the encoder's buffers equal. Broadcasting them before each forward pass would hang a
    # validation in which ranks have different numbers of batches. The gradients are views of the buffers that the ranks
    # exchange, which saves a second copy of them. No static_graph: PyTorch 2.15 fails in it when gradients accumulate.
    # e4e's first stages do not use all heads of the encoder.
    unused = isinstance(module, LitE4E)
    ddp = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused)
    trainer = build_trainer(cfg, [AverageBatchNorm(), Forecast(ADVICE)], ddp, checkpoint, _batch_norm(cfg))
    return Training(trainer, module, data, None if checkpoint is None else checkpoint["global_step"])


def _batch_norm(cfg: DictConfig) -> list[Any]:
    """Return the plugin that synchronizes the BatchNorm layers, if there is one."""
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()  # SyncBatchNorm exists only there
    if not on_gpu or cfg.model.batch_norm not in ("sync", "machine"):
        return []
    if cfg.model.batch_norm == "sync" or cfg.trainer.num_nodes == 1:
        return [TorchSyncBatchNorm()]
    return [MachineBatchNorm(count_devices(cfg.trainer.accelerator, cfg.trainer.devices))]


def build_data(cfg: DictConfig) -> Any:
    """Build the task's data module with the stores of the domain."""
    make = instantiate(cfg, "task.datamodule")
    options = {key: cfg.data[key] for key in ("batch_size", "val_batch_size", "num_workers", "seed")}
    options["flip"] = cfg.data.get("flip")
    if cfg.data.get("generated_share"):  # the user's own task may not know these arguments
        options |= {"generated_share": cfg.data.generated_share, "generated_limit": cfg.data.get("limit")}
    parts = [part for part in ("train", "val") if cfg.data.get(part, "") is not None]  # null: no images
    stores = {"train": None, "val": None, **{part: instantiate(cfg, f"data.{part}", "data") for part in parts}}
    with naming(cfg, "data", "domain", "task.datamodule"):
        return make(
            **stores,
            input_size=cfg.domain.input_size,
            target_size=cfg.domain.target_size,
            **options,
        )


def build_net(cfg: DictConfig, source: dict[str, Any], in_channels: int) -> PSP:
    """Build encoder and generator; derive `n_styles` and `style_dim` from the generator."""
    made = instantiate(cfg, "generator")
    generator, latent_avg = made if isinstance(made, tuple) else (made, None)
    samples = whole("model.latent_avg_samples", cfg.model.latent_avg_samples, 1)
    if latent_avg is None:
        latent_avg = generator.latent_average(n=samples)
    derived = {
        "n_styles": generator.n_styles,
        "style_dim": generator.style_dim,
        "in_channels": in_channels,
        "input_size": cfg.domain.input_size,
    }
    make = instantiate(cfg, "encoder")
    if "n_styles" not in inspect.signature(make.func).parameters:
        del derived["n_styles"]  # an encoder into W predicts one style
    with naming(cfg, "encoder"):
        encoder = make(**derived)
    refiner = build_refiner(cfg, generator)
    average = cfg.model.start_from_latent_avg
    net = PSP(encoder, generator, latent_avg, start_from_latent_avg=average, source=source, refiner=refiner)
    if cfg.model.backbone is not None:
        log.info("%s", load_backbone(net.encoder, cfg.model.backbone))
    if cfg.init_from is not None:
        state = load_psp(cfg.init_from).state_dict()
        refined = any(key.startswith("refiner.") for key in state)
        if refined and refiner is None:
            raise UserError(f"init_from={cfg.init_from}: this network has a refiner. Add refiner=features.")
        own = [] if refined else ["refiner.*"]  # the file may have no refiner
        chosen = generator_hash(generator) if "path" in cfg.generator else None
        log.info("%s", load_strict(net, state, own, what=f"init_from={cfg.init_from}"))
        if chosen not in (None, generator_hash(generator)):
            raise UserError(
                f"init_from={cfg.init_from} contains another generator than generator.path={cfg.generator.path}, and "
                f"its encoder was trained for that one. To train with it, set generator.path={cfg.init_from}."
            )
    if refiner is not None and not cfg.refiner.train_encoder:
        if cfg.init_from is None and cfg.resume is None:
            raise UserError(
                "refiner.train_encoder=false freezes the encoder, which is not trained yet. Give "
                "init_from=NAME_OR_RUN, or set refiner.train_encoder=true."
            )
        freeze(net.encoder)
    if cfg.model.checkpointing:
        if cfg.model.compile:
            raise UserError("model.checkpointing=true and model.compile=true exclude each other. Leave one out.")
        checkpoint_units(net.encoder)
    if cfg.model.compile:
        net.encoder.compile()  # in place, to keep the state-dict keys unchanged
    on_cpu = computes_on_cpu(cfg.trainer.accelerator)
    return freeze_psp_generator(net, autocast_dtype(cfg.trainer.precision, on_cpu))


def build_refiner(cfg: DictConfig, generator: Any) -> torch.nn.Module | None:
    """Build the selected refiner for a feature map of the generator."""
    if cfg.get("refiner") is None:
        return None
    side = whole("refiner.resolution", cfg.refiner.resolution, 4, optional=True) or max(16, generator.output_size // 16)
    maps = getattr(generator, "feature_channels", {})
    if side not in maps:
        raise UserError(f"refiner.resolution={side}: the generator's feature maps have the sides {list(maps)}.")
    make = instantiate(cfg, "refiner", without=["edit_share", "train_encoder"])
    with naming(cfg, "refiner"):
        refiner: torch.nn.Module = make(resolution=side, channels=maps[side], input_size=cfg.domain.input_size)
    return refiner


def load_backbone(encoder: torch.nn.Module, name: str) -> LoadReport:
    """Initialise the encoder's backbone with the weights of the face recognition network, as in the paper.

    Args:
        encoder: an encoder with the layers of IR-SE50.
        name: `ir_se50` (in the weights folder), or a file.

    Raises:
        UserError: the file is missing or contains another network.

    Source: pSp's training code. If the source does not have three channels, the first layer keeps its random weights.
    Weights for an image next to the source (ReStyle) start at zero.
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
    """Build the selected loss terms with their weights."""
    losses = cfg.get("loss") or {}
    terms = {str(name): instantiate(cfg, f"loss.{name}", without=["weight"]) for name in losses}
    return CompositeLoss(terms, {name: losses[name].get("weight", 1.0) for name in terms})


def toy_terms(cfg: DictConfig) -> list[str]:
    """Return the loss terms that use the toy faces' network although generator and images are the user's own."""
    if cfg.data.name == "toyfaces" or str(cfg.generator.get("path", "")).startswith("toyfaces/"):
        return []
    return [name for name, node in (cfg.get("loss") or {}).items() if node and TOY_NETWORK in node.values()]


def build_metrics(cfg: DictConfig, losses: CompositeLoss) -> dict[str, Any]:
    """Build the selected metrics. A metric with a `loss` key uses that term's network, and is left out without it."""
    metrics = {}
    for name, node in (cfg.get("metric") or {}).items():
        if not isinstance(node, DictConfig) or node.get("loss") is None or node.loss in losses.terms:
            metrics[str(name)] = build_metric(cfg, str(name), losses.terms)
        else:
            log.info("not measuring %s: it uses the loss '%s', which is not in loss=[...]", name, node.loss)
    return metrics


def build_metric(cfg: DictConfig, name: str, terms: Any) -> Any:
    """Build a metric. If it has a `loss` key, pass it the function with which that term compares images."""
    node = cfg.metric[name]
    if not isinstance(node, DictConfig) or node.get("loss") is None:
        return instantiate(cfg, f"metric.{name}", without=["loss"])
    term = terms[node.loss]
    function = next((name for name in ("similarity", "distance") if hasattr(term, name)), None)
    if function is None:
        raise UserError(
            f"metric.{name}.loss={node.loss}: the loss '{node.loss}' does not measure a similarity. Name one that "
            "does, such as id or moco, or leave out `loss`."
        )
    metric = instantiate(cfg, f"metric.{name}", without=["loss"], **{function: getattr(term, function)})
    if isinstance(metric, ImageMean):
        network = term.face_convention if getattr(metric, "aligned", False) else term.convention
        metric.convention = ", ".join(filter(None, [metric.convention, network]))
    return metric


def build_module(cfg: DictConfig, data: Any) -> LitPSP:
    """Build the LightningModule of a run."""
    source = {**data.spec.to_dict(), "size": cfg.domain.input_size}
    losses = build_losses(cfg)
    net = build_net(cfg, source, data.spec.channels)
    optimizer = instantiate(cfg, "optimizer")
    with naming(cfg, "optimizer"):
        optimizer([torch.nn.Parameter(torch.zeros(1))])  # report invalid settings before the training starts
    with naming(cfg, "data"):
        drawing = Drawing(**{key: cfg.data[key] for key in ("truncation", "mixing", "noise") if key in cfg.data})
    kind, options = LitPSP, {}
    if cfg.get("editability") is not None:
        if cfg.model.compile:
            raise UserError("editability=e4e and model.compile=true exclude each other. Leave one out.")
        kind, options = LitE4E, {"recipe": instantiate(cfg, "editability"), "seed": cfg.seed}
    with naming(cfg, "model"):
        module = kind(
            net,
            losses,
            optimizer,
            metrics=build_metrics(cfg, losses),
            noise=cfg.model.noise,
            batch_norm=cfg.model.batch_norm,
            warmup_steps=cfg.model.warmup_steps,
            decay_steps=cfg.model.decay_steps,
            total_steps=cfg.trainer.max_steps,
            log_every=cfg.trainer.log_every_n_steps,
            source_is_target=getattr(data, "source_is_target", False),
            edit_share=0.0 if net.refiner is None else cfg.refiner.edit_share,
            drawing=drawing,
            loss_per_pass=cfg.model.loss_per_pass,
            **options,
        )
    if getattr(net.encoder, "widths", [WIDE])[0] < WIDE:
        return module
    return module.to(memory_format=torch.channels_last)  # convolutions are faster in this format


def check_monitored(cfg: DictConfig, module: LitPSP, data: Any) -> None:
    """Raise a UserError now for a monitored value that is never logged; the first validation may be hours away."""
    images = not isinstance(data, TaskDataModule) or data.has_images("val")  # their codes are unknown
    terms = [
        name for name, term in module.losses.terms.items() if not (images and "codes" in getattr(term, "needs", ()))
    ]
    if not terms:
        raise UserError(
            f"none of the losses ({', '.join(module.losses.terms)}) can be computed on validation images, whose codes "
            "are unknown. Add one that compares images, such as loss=[l2,latent], or use data=generated."
        )
    logged = ["val/loss", *(f"val/loss_{name}" for name in terms), *(f"val/{name}" for name in module.val_metrics)]
    monitored = {"objective": cfg.objective}
    for name, node in cfg.callbacks.items():
        if node and "monitor" in node:
            monitored[f"callbacks.{name}.monitor"] = node.monitor
            choice(f"callbacks.{name}.mode", node.get("mode", "min"), ("min", "max"))
    for key, value in monitored.items():
        extra = any(str(value).startswith(f"val/{name}_") for name in terms)  # extra values that a term logs
        if value is not None and value not in logged and not extra:
            raise UserError(f"{key}={value} is not logged.{suggest(value, logged)} Logged: {', '.join(logged)}")

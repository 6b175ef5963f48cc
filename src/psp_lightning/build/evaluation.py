"""Build the objects of psp-evaluate from its configuration: images, network, metrics and Trainer."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import Dataset, Subset
from torchmetrics import Metric

from psp_lightning.build.instantiate import instantiate, naming
from psp_lightning.build.inversion import build_inverter, check_source, describe_steps, load_network, steps
from psp_lightning.build.trainer import quiet
from psp_lightning.build.training import build_metric
from psp_lightning.data.datamodules import DATAMODULES
from psp_lightning.data.image_pairs import ImagePairs
from psp_lightning.data.loader import ReadableDataLoader
from psp_lightning.data.masks import SHAPES
from psp_lightning.data.spec import InputSpec
from psp_lightning.inference.frozen import freeze_psp_generator
from psp_lightning.lit.distributed import cluster
from psp_lightning.lit.evaluation import (
    Given,
    Identity,
    LitEvaluator,
    Network,
    collate_images,
    share,
)
from psp_lightning.lit.prediction import PredictionBar, make_inject
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.devices import count_devices, count_nodes, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory
from psp_lightning.utils.names import portable

IDENTITY, PAIRS = "identity", "pairs"  # the value of `ckpt` for the source itself; the task of finished images
# The task of an encoder for each kind of source. Encoders for RGB may also be for frontalization or toonify.
TASK_OF = {
    "rgb": "inversion", "sketch": "sketch2face", "labels": "seg2face", "lowres": "superres", "masked": "inpainting",
}  # fmt: skip
KIND_OF = {**{task: kind for kind, task in TASK_OF.items()}, "frontalization": "rgb", "toonify": "rgb"}


@dataclass
class Subject:
    """The subject of an evaluation: the images, and the module that makes the outputs.

    Attributes:
        task: name of the task, or `pairs`.
        names: name of each image.
        spec: description of the source; None for finished images.
    """

    task: str
    dataset: Dataset[dict[str, Any]]
    names: list[str]
    predict: nn.Module
    spec: InputSpec | None = None


def check_settings(cfg: DictConfig) -> None:
    """Raise a UserError for invalid settings, before anything is loaded."""
    choice("as", cfg["as"], ("uint8", "float"))
    if "store" not in cfg.data:
        raise UserError(
            f"data={cfg.data.get('name', '')} has no images to measure on. Use data=toyfaces, or data=folder "
            "data.root=DIR."
        )
    if (cfg.outputs is None) != (cfg.targets is None):
        lacking = "targets" if cfg.targets is None else "outputs"
        raise UserError(f"{lacking}=DIR must be given too: outputs are compared with the targets of the same name.")
    if (cfg.ckpt is None) == (cfg.outputs is None):
        raise UserError("give either ckpt=NAME_OR_RUN, or outputs=DIR and targets=DIR.")
    _check_used(cfg)
    if not cfg.get("metric"):
        raise UserError("metric=[] measures nothing. Choose metrics, e.g. metric=[mse,psnr].")
    if cfg.mask.kind is not None:
        choice("mask.kind", cfg.mask.kind, SHAPES)
    if not isinstance(cfg.mix.latent_mask, ListConfig | None):
        raise UserError(f"mix.latent_mask={cfg.mix.latent_mask} must be a list, e.g. [{cfg.mix.latent_mask}].")
    lows = {"batch_size": 1, "num_workers": 0, "images": 0, "timing": 0, "seed": 0, "mix.n_outputs": 1, "mix.seed": 0}
    for key, low in lows.items():
        OmegaConf.update(cfg, key, whole(key, OmegaConf.select(cfg, key), low))
    cfg.size = whole("size", cfg.size, 1, optional=True)
    cfg.factor = whole("factor", cfg.factor, 1, 2**15, optional=True)
    number("mix.alpha", cfg.mix.alpha)


def _check_used(cfg: DictConfig) -> None:
    """Raise a UserError for a setting without effect, because the row would have a wrong label."""
    if cfg.ckpt not in (None, IDENTITY):
        return
    keys = ["mix.latent_mask"] + ([] if cfg.outputs is None else ["task", "factor", "mask.kind"])
    given = [key for key in keys if OmegaConf.select(cfg, key) is not None]
    given += [] if cfg.mix.n_outputs == 1 else ["mix.n_outputs"]
    given += ["embed or refine"] if describe_steps(cfg) else []
    if given:
        what = "ckpt=identity has no codes" if cfg.outputs is None else "outputs= are measured as they are"
        raise UserError(f"{what}: {', '.join(given)} would have no effect. Leave it out.")


def build_subject(cfg: DictConfig) -> Subject:
    """Build the subject of the evaluation.

    Raises:
        UserError: the images or the checkpoint are missing, or do not fit each other.
    """
    if cfg.outputs is not None:
        pairs = ImagePairs(cfg.outputs, cfg.targets, cfg.size)
        return Subject(PAIRS, pairs, pairs.names(), Given())
    net = None if cfg.ckpt == IDENTITY else freeze_psp_generator(load_network(cfg))
    spec = None if net is None else _spec(cfg, net.source)
    task = cfg.task.name if cfg.get("task") else "inversion" if spec is None else TASK_OF[spec.kind]
    if spec is not None and KIND_OF.get(task, spec.kind) != spec.kind:
        raise UserError(
            f"{cfg.ckpt} was trained for {TASK_OF[spec.kind]}: it takes {spec.kind} images, but task={task} has "
            f"{KIND_OF[task]} images. Leave out task=, or choose another checkpoint."
        )
    with naming(cfg, "data"):
        store = instantiate(cfg, "data.store", "data")
        size = cfg.size or (256 if spec is None else spec.size)
        if cfg.size is None and spec is None and hasattr(store, "faces"):
            size = store.faces.size
        make = instantiate(cfg, "task.datamodule") if cfg.get("task") else DATAMODULES[task]
        data = make(store, store, input_size=spec.size if spec else size, target_size=size, seed=cfg.seed)
    data.spec = spec = _given(cfg, spec or data.spec)
    if net is not None:
        check_source(cfg, spec)
    if (used := steps(cfg)) and task != "inversion":  # sources of the right kind, but other targets
        raise UserError(
            f"{used[0]}=optimize makes the output equal to the source, but the target of task={task} is another image."
        )
    dataset = data.dataset("val")
    root, _ = store.listing()
    names = [portable(os.path.relpath(path, root) if os.path.exists(path) else path) for path in store.paths()]
    if net is None:
        return Subject(task, dataset, names, Identity(spec), spec)
    mask = None if cfg.mix.latent_mask is None else list(cfg.mix.latent_mask)
    with torch.no_grad(), naming(cfg, "mix"):
        inject = make_inject(net, mask, cfg.mix.n_outputs, cfg.mix.seed, None)
    return Subject(task, dataset, names, Network(net, build_inverter(cfg, net), mask, inject, cfg.mix.alpha), spec)


def _spec(cfg: DictConfig, source: dict[str, Any]) -> InputSpec:
    if "kind" not in source:
        raise UserError(f"{cfg.ckpt} does not say what its encoder takes as source (see PSP(..., source=...)).")
    return InputSpec.from_dict(source)


def _given(cfg: DictConfig, spec: InputSpec) -> InputSpec:
    """Return the description of the source with the settings `factor` and `mask.kind` applied."""
    for key, kind in (("factor", "lowres"), ("mask.kind", "masked")):
        value = OmegaConf.select(cfg, key)
        if value is not None and spec.kind != kind:
            raise UserError(f"{key}={value} is for {TASK_OF[kind]}; the sources here are {spec.kind} images.")
    if cfg.factor is not None:
        spec = replace(spec, factors=(cfg.factor,))
    return spec if cfg.mask.kind is None else replace(spec, mask={"kind": cfg.mask.kind})


def build_metrics(cfg: DictConfig) -> tuple[dict[str, Metric], nn.ModuleDict, dict[str, str]]:
    """Build the selected metrics.

    Returns:
        The metrics; the loss terms whose networks they use; and the reasons why others cannot be measured.
    """
    metrics: dict[str, Metric] = {}
    errors: dict[str, str] = {}
    terms = nn.ModuleDict()
    for name in map(str, cfg.metric):
        try:
            term = cfg.metric[name].get("loss")
            if term is not None and term not in terms:
                terms[term] = instantiate(cfg, f"loss.{term}", without=["weight"])
            metrics[name] = build_metric(cfg, name, terms)
        except UserError as error:
            errors[name] = str(error)
    return metrics, terms, errors


def build_evaluation(cfg: DictConfig, subject: Subject) -> tuple[pl.Trainer, LitEvaluator, Any, dict[str, str]]:
    """Build Trainer, module and this rank's batches, and the reasons why some metrics cannot be measured.

    Raises:
        UserError: a mistake in the settings.
    """
    quiet()
    if computes_on_cpu(cfg.accelerator):
        keep_freed_memory()
    metrics, terms, errors = build_metrics(cfg)
    module = LitEvaluator(subject.predict, metrics, terms, cfg["as"] == "uint8").eval().requires_grad_(False)
    accelerator, devices = resolve_devices(cfg.accelerator, cfg.devices)
    world = count_devices(accelerator, devices) * count_nodes()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=count_nodes(),
        plugins=[cluster()],
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,  # each rank gets its share below
        inference_mode=not steps(cfg),
        callbacks=[PredictionBar("evaluate")] if cfg.progress_bar else [],
        enable_progress_bar=cfg.progress_bar,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = ReadableDataLoader(
        Subset(subject.dataset, share(len(subject.names), cfg.batch_size, trainer.global_rank, world)),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        collate_fn=collate_images,
        pin_memory=torch.cuda.is_available(),
    )
    return trainer, module, loader, errors


def count_ranks(cfg: DictConfig, wanted: int) -> int:
    """Return the number of ranks to start: at most one for each batch."""
    if wanted == 1:
        return 1
    if cfg.outputs is not None:
        n = len(ImagePairs(cfg.outputs, cfg.targets, cfg.size))
    else:
        with naming(cfg, "data"):
            n = len(instantiate(cfg, "data.store", "data").paths())
    return min(wanted, math.ceil(n / cfg.batch_size))

"""Build the objects of psp-predict from its configuration: inputs, network, writer and Trainer."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Subset

from psp_lightning.build.instantiate import import_plugins, naming
from psp_lightning.build.trainer import quiet
from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.data.inputs import InputDataset, InputFile, LatentDataset, collate_inputs, list_inputs
from psp_lightning.data.masks import SHAPES
from psp_lightning.data.pairing import list_images
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.data.transforms import open_image
from psp_lightning.inference.frozen import autocast_dtype, freeze_psp_generator, plain_generator
from psp_lightning.latents.codes import Latents
from psp_lightning.latents.files import DESCRIBED, PLAIN, gather_latents, read_latents
from psp_lightning.lit.prediction import FORMATS, LitPredictor, Outputs, PredictionBar, PredictionWriter, make_inject
from psp_lightning.loading import load_decoder, load_psp
from psp_lightning.models.psp import PSP
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.devices import count_devices, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory

COLOURED = 8  # mean difference of the largest and the smallest channel, of 255; a scanned sketch stays below
PRECISIONS = ("32-true", "bf16", "bf16-mixed", "16-mixed")
SWITCHES = ("side_by_side", "sheet", "overwrite", "any_generator", "fuse", "compile", "cuda_graphs")


@dataclass
class PredictionPlan:
    """The planned outputs, the indices of the inputs to process, and the codes if `input` is a file of latents."""

    outputs: Outputs
    todo: list[int]
    latents: Latents | None

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Return the manifest records of the inputs whose outputs exist already."""
        todo = set(self.todo)
        return [self.outputs.record(i, "skipped") for i in range(len(self.outputs.files)) if i not in todo]

    def write_latents(self, cfg: DictConfig, records: list[dict[str, Any]]) -> Path | None:
        """Write OUTPUT/latents.safetensors with all codes and return its path, or None if `latents` is off.

        Raises:
            UserError: codes from an earlier call belong to another generator.
        """
        good = sorted(record["index"] for record in records if record["status"] != "error")
        if not cfg.latents or not good:
            return None
        path = self.outputs.folder / "latents.safetensors"
        gather_latents(path, [self.outputs.code(index) for index in good])
        return path


def plan_prediction(cfg: DictConfig) -> PredictionPlan:
    """Check the settings, list the inputs and find the outputs that exist already.

    Raises:
        UserError: a setting is invalid, there is no input, or the output folder cannot be written.
    """
    _check_settings(cfg)
    folder = Path(cfg.output)
    latents = None
    if Path(str(cfg.input)).suffix in (*DESCRIBED, *PLAIN):
        latents = _read_latents(cfg)
        files = [InputFile(Path(str(cfg.input)).expanduser(), name) for name in latents.names]
    else:
        files = list_inputs(str(cfg.input), exclude=folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output={folder} cannot be written: {error.strerror}.") from None
    outputs = Outputs(
        folder, files, cfg.format, cfg.mix.n_outputs, cfg.side_by_side, bool(cfg.latents), named=latents is not None
    )
    _refuse_clashes(outputs, cfg.sheet)
    every = range(len(files))
    todo = [i for i in every if cfg.overwrite or not all(path.exists() for path in outputs.all(i))]
    return PredictionPlan(outputs, todo, latents)


def _check_settings(cfg: DictConfig) -> None:
    """Raise a UserError for invalid settings, before a network is loaded."""
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
    for key in ("resize", "factor"):
        cfg[key] = whole(key, cfg[key], 1, 2**15, optional=True)
    cfg.mix.n_outputs = whole("mix.n_outputs", cfg.mix.n_outputs, 1)
    cfg.mix.seed = whole("mix.seed", cfg.mix.seed, 0)
    number("mix.alpha", cfg.mix.alpha)


def _read_latents(cfg: DictConfig) -> Latents:
    """Read the codes in `input`; raise a UserError for a file without latents or for settings that need images."""
    path = Path(str(cfg.input)).expanduser()
    image = {"side_by_side": cfg.side_by_side, "factor": cfg.factor is not None}
    image |= {"mask": cfg.mask.kind is not None or cfg.mask.dir is not None or cfg.mask.composite}
    if given := [key for key, value in image.items() if value]:
        raise UserError(f"{given[0]} is for images; input={cfg.input} contains latents.")
    latents = read_latents(path)
    results = {Path(cfg.output) / f"latents{suffix}" for suffix in DESCRIBED}
    if cfg.latents and path.resolve() in {result.resolve() for result in results}:
        raise UserError(f"latents={cfg.latents} would overwrite input={cfg.input}. Choose another output folder.")
    return latents


def _refuse_clashes(outputs: Outputs, sheet: bool) -> None:
    """Raise a UserError if two outputs have the same path, e.g. for an input called sheet or a folder side_by_side."""
    taken = {outputs.folder / "sheet.png"} if sheet else set()
    for index, file in enumerate(outputs.files):
        for path in outputs.all(index):
            if path in taken:
                raise UserError(
                    f"{path} would be written twice (for {file.path}): rename the input or change the options."
                )
            taken.add(path)


def build_prediction(
    cfg: DictConfig, plan: PredictionPlan
) -> tuple[pl.Trainer, LitPredictor, DataLoader[Any], PredictionWriter]:
    """Build Trainer, network, this rank's inputs and writer.

    Raises:
        UserError: a mistake in the checkpoint, the inputs or the settings.
    """
    quiet()
    import_plugins(cfg.plugins)
    if computes_on_cpu(cfg.accelerator):
        keep_freed_memory()
    spec = None
    dataset: Dataset[dict[str, Any]]
    space, average = "w_plus", None
    if plan.latents is not None:
        net = load_decoder(cfg.ckpt)
        latents = plan.latents.of(net.generator, str(cfg.ckpt), cfg.any_generator)
        space, average = latents.space, latents.lacking(net)
        dataset = LatentDataset(latents.codes)
        spec = _spec(cfg, net) if net.source else None  # for mix.reference
    else:
        net = load_psp(cfg.ckpt)
        spec = _spec(cfg, net)
        masks = None if cfg.mask.dir is None else {p.stem: p for p in list_images(cfg.mask.dir, "mask folder")}
        _warn_of_photographs(cfg, spec, plan)
        dataset = InputDataset(plan.outputs.files, spec, cfg.factor, masks, cfg.seed)
    mask = None if cfg.mix.latent_mask is None else list(cfg.mix.latent_mask)
    with torch.inference_mode():
        frozen, reference = freeze_psp_generator(net), _reference(cfg, spec)
        with naming(cfg, "mix"):
            inject = make_inject(frozen, mask, cfg.mix.n_outputs, cfg.mix.seed, reference)
    digest = generator_hash(net.generator) if cfg.latents else None
    module = LitPredictor(
        _for_inference(cfg, net), mask, inject, cfg.mix.alpha, cfg.resize, cfg.mask.composite, space, average,
        cfg.compile, cfg.cuda_graphs, cfg.batch_size,
    )  # fmt: skip
    writer = PredictionWriter(plan.outputs, spec, digest, str(cfg.ckpt))
    accelerator, devices = resolve_devices(cfg.accelerator, cfg.devices)
    world = count_devices(accelerator, devices)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision="32-true" if cfg.precision == "bf16" else cfg.precision,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,  # each rank gets its share below
        callbacks=[writer] + ([PredictionBar()] if cfg.progress_bar else []),
        enable_progress_bar=cfg.progress_bar,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, plan.todo[trainer.global_rank :: world]),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers if plan.latents is None else 0,
        collate_fn=collate_inputs,
        pin_memory=torch.cuda.is_available(),
    )
    return trainer, module, loader, writer


def _for_inference(cfg: DictConfig, net: PSP) -> PSP:
    """Return the network in the form that the speed settings ask for; autocast runs the plain one."""
    if not cfg.fuse or cfg.precision.endswith("-mixed"):
        dtype = autocast_dtype(cfg.precision, computes_on_cpu(cfg.accelerator))
        net = freeze_psp_generator(net.to(memory_format=torch.channels_last), dtype)
    else:
        net = net.for_inference(torch.bfloat16 if cfg.precision == "bf16" else torch.float32, pack=not cfg.compile)
    if cfg.compile:
        net.generator = plain_generator(net.generator)
    return net


def _spec(cfg: DictConfig, net: PSP) -> InputSpec:
    """Return the network's input specification; raise a UserError if a setting is for another kind of source."""
    values = dict(net.source)
    if "kind" not in values:
        size = getattr(net.encoder, "input_size", 256)
        raise UserError(
            f"{cfg.ckpt} does not say what its encoder takes as source: it was trained without PSP(..., source=...). "
            f"Add it in Python: net = PSP.from_checkpoint({str(cfg.ckpt)!r}); net.source = InputSpec('rgb', "
            f"size={size}).to_dict(); psp_lightning.checkpoints.weight_files.save_psp('FILE.safetensors', net)"
        )
    if cfg.mask.kind is not None:
        values["mask"] = {"kind": cfg.mask.kind}
    spec = InputSpec.from_dict(values)
    if spec.kind != "masked" and (cfg.mask.composite or cfg.mask.kind is not None or cfg.mask.dir is not None):
        raise UserError(f"mask.* is for inpainting; {cfg.ckpt} takes {spec.kind} images.")
    if cfg.factor is not None and cfg.factor > spec.size:
        raise UserError(f"factor={cfg.factor} is larger than the {spec.size} pixels of the input.")
    if cfg.factor is not None and spec.kind != "lowres":
        raise UserError(f"factor={cfg.factor} is for super-resolution; {cfg.ckpt} takes {spec.kind} images.")
    return spec


def _warn_of_photographs(cfg: DictConfig, spec: InputSpec, plan: PredictionPlan) -> None:
    """Warn once if a network for sketches gets a coloured picture first."""
    if spec.kind != "sketch" or not plan.todo:
        return
    file = plan.outputs.files[plan.todo[0]].path
    with contextlib.suppress(UserError):  # an unreadable input becomes a record
        colours = np.asarray(open_image(file).convert("RGB").resize((64, 64)), dtype=np.float32)
        if np.ptp(colours, axis=-1).mean() > COLOURED:
            rank_zero_warn(f"{cfg.ckpt} takes line sketches, but {file} is in colour: its output will be poor.")


def _reference(cfg: DictConfig, spec: InputSpec | None) -> torch.Tensor | None:
    """Return the source whose styles are injected."""
    if cfg.mix.reference is None:
        return None
    if spec is None:
        raise UserError(f"mix.reference needs an encoder; {cfg.ckpt} contains only a generator.")
    return load_source(cfg.mix.reference, spec)

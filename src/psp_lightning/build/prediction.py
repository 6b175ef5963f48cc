"""Build the objects of psp-predict from its configuration: inputs, network, writer and Trainer."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from psp_lightning.build.alignment import AlignmentPlan
from psp_lightning.build.instantiate import import_plugins, naming
from psp_lightning.build.inversion import (
    build_inverter,
    check_source,
    drops_refinement,
    has_refinements,
    load_network,
    makes_refinement,
    recorded_steps,
    refinement_files,
    refinement_reader,
    starts_from_average,
    steps,
)
from psp_lightning.build.photos import align_inputs, crops, paste_jobs, paste_outputs
from psp_lightning.build.prediction_settings import check_settings, check_width
from psp_lightning.build.trainer import quiet
from psp_lightning.checkpoints.read import resolve
from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.data.inputs import InputDataset, InputFile, LatentDataset, collate_inputs, input_masks, list_inputs
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.inference.frozen import autocast_dtype, freeze_psp_generator, plain_generator
from psp_lightning.inference.invert import Inverter
from psp_lightning.latents.codes import Latents
from psp_lightning.latents.files import DESCRIBED, PLAIN, gather_latents, read_latents
from psp_lightning.lit.distributed import cluster
from psp_lightning.lit.manifest import MANIFEST, difference, read_manifest, save_manifest
from psp_lightning.lit.prediction import LitPredictor, Outputs, PredictionBar, PredictionWriter, make_inject
from psp_lightning.loading import load_decoder
from psp_lightning.models.psp import PSP
from psp_lightning.utils.devices import count_devices, count_nodes, resolve_devices
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory
from psp_lightning.utils.names import native
from psp_lightning.utils.pictures import open_image
from psp_lightning.zoo.locate import sha256

COLOURED = 8  # mean difference of the largest and the smallest channel, of 255; a scanned sketch stays below


@dataclass
class PredictionPlan:
    """The planned outputs, the indices of the inputs to process, and the codes if `input` is a file of latents.

    `skipped` contains the manifest records of the other inputs, whose outputs exist already.
    """

    outputs: Outputs
    todo: list[int]
    skipped: list[dict[str, Any]]
    latents: Latents | None
    inputs: InputDataset | None = None  # filled by `build_prediction`
    alignment: AlignmentPlan | None = None  # set if the inputs are faces from photos

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

    def paste(self, cfg: DictConfig, records: list[dict[str, Any]]) -> dict[str, list[str]] | None:
        """Write OUTPUT/pasted, the photos with the outputs in place, see `paste_outputs`; None if this is off."""
        if not cfg.paste_back or self.alignment is None:
            return None
        good = [record for record in records if record["status"] != "error"]
        outputs = {record["source"]: self.outputs.images(record["index"]) for record in good}
        return paste_outputs(cfg, paste_jobs(cfg, self.alignment, outputs, self.outputs.made))


def plan_prediction(cfg: DictConfig, share: Callable[[Callable[[], Any]], Any] = lambda make: make()) -> PredictionPlan:
    """Check the settings, list the inputs and find existing outputs.

    Args:
        cfg: settings.
        share: returns the value of a function on the first rank. If each rank looked for existing outputs, a late one
            would find the outputs of the others. `skipped` contains records only on the first rank.

    Raises:
        UserError: a setting is invalid, there is no checkpoint or input, the output folder cannot be written, or it
            contains an output that another checkpoint or other settings made.
    """
    check_settings(cfg)
    import_plugins(cfg.plugins)
    folder = Path(cfg.output)
    latents = None
    alignment = None
    if Path(str(cfg.input)).suffix in (*DESCRIBED, *PLAIN):
        latents = _read_latents(cfg)
        files = [InputFile(Path(str(cfg.input)).expanduser(), native(name)) for name in latents.names]
    elif cfg.align:
        net = load_network(cfg)
        alignment = align_inputs(cfg, _spec(cfg, net), _target_size(cfg, net))
        files = crops(alignment)
    else:
        files = list_inputs(str(cfg.input), exclude=folder)
    if cfg.refinements is not None and (latents is None or drops_refinement(cfg)):
        raise UserError(
            f"refinements={cfg.refinements} has no effect here: it is for latents as input, and not for refine=none."
        )
    companions: dict[int, Path] = {}
    if latents is not None and has_refinements(cfg, latents):
        companions = dict(enumerate(refinement_files(cfg, latents)))
    elif cfg.mask.dir is not None:
        masks = input_masks(files, cfg.mask.dir)
        paths = [os.fspath(file.path) for file in files]
        companions = {index: masks[path] for index, path in enumerate(paths) if path in masks}
    made = _made(cfg, latents is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output={folder} cannot be written: {error.strerror}.") from None
    outputs = Outputs(
        folder, files, cfg.format, cfg.mix.n_outputs, cfg.side_by_side, bool(cfg.latents),
        refined=bool(cfg.latents) and has_refinements(cfg, latents), named=latents is not None,
        checkpoint=str(cfg.ckpt), made=made, companions=companions,
    )  # fmt: skip
    _refuse_clashes(outputs, cfg.sheet)
    skipped: list[dict[str, Any]] = []

    def divide() -> tuple[int, list[int]]:
        skipped.extend([] if cfg.overwrite else _existing(outputs))
        todo = sorted({*range(len(files))} - {record["index"] for record in skipped})
        if todo:  # an interrupted prediction can then tell its own outputs from others
            save_manifest(folder, skipped + [outputs.record(index, "pending") for index in todo])
        return len(files), todo

    n_inputs, todo = share(divide)
    if n_inputs != len(files):
        raise UserError(f"input={cfg.input} has {len(files)} files on this machine, but {n_inputs} on the first one.")
    return PredictionPlan(outputs, todo, skipped, latents, alignment=alignment)


def _made(cfg: DictConfig, decoder: bool) -> dict[str, Any]:
    """Return what determines the content of the outputs except for rounding: the checkpoint and the settings."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {key: values[key] for key in ("resize", "factor", "precision", "seed", "refinements")}
    settings |= recorded_steps(cfg)
    groups = ("mask",) if values["mix"]["latent_mask"] is None else ("mask", "mix")
    settings |= {f"{group}.{key}": value for group in groups for key, value in values[group].items()}
    digest = sha256(resolve(str(cfg.ckpt), generator=decoder or starts_from_average(cfg)))
    if cfg.mix.reference is not None and os.path.isfile(cfg.mix.reference):  # reading it reports that it is missing
        settings["mix.reference_sha256"] = sha256(cfg.mix.reference)
    return {
        "sha256": digest,
        **{key: value for key, value in settings.items() if value is not None and value is not False},
    }


def _existing(outputs: Outputs) -> list[dict[str, Any]]:
    """Return the records of the inputs whose outputs exist and do not have to be written again.

    Raises:
        UserError: an output exists that is not recorded, or was made from another input, by another checkpoint or with
            other settings.
    """
    makers = {name: record for record in read_manifest(outputs.folder) for name in record["files"]}
    skipped, refused = [], []
    for index in range(len(outputs.files)):
        now = outputs.record(index, "skipped")
        found = {name: makers.get(name) for name in now["files"] if os.path.isfile(outputs.folder / name)}
        reasons = {name: difference(maker, now) for name, maker in found.items()}
        refused += [f"{outputs.folder / name} {reason}" for name, reason in reasons.items() if reason]
        done = [maker for maker in found.values() if maker and maker["status"] in ("ok", "skipped")]
        if len(done) == len(now["files"]) and all(maker["stamp"] == now["stamp"] for maker in done):
            files = dict.fromkeys(name for maker in done for name in maker["files"])  # some may be from other options
            skipped.append({**now, "files": list(files)})
    if refused:
        raise UserError(
            f"{len(refused)} outputs exist already and may differ from the new ones: {refused[0]}. "
            "overwrite=true replaces them; or set output= to another folder."
        )
    return skipped


def _read_latents(cfg: DictConfig) -> Latents:
    """Read the codes in `input`; raise a UserError for a file without codes, or for a setting that needs images."""
    path = Path(str(cfg.input)).expanduser()
    image = {"side_by_side": cfg.side_by_side, "factor": cfg.factor is not None, "align": cfg.align}
    image |= {"mask": cfg.mask.kind is not None or cfg.mask.dir is not None or cfg.mask.composite}
    image |= {"embed": cfg.embed is not None, "refine": makes_refinement(cfg)}
    if given := [key for key, value in image.items() if value]:
        raise UserError(f"{given[0]} is for images; input={cfg.input} contains latents.")
    return read_latents(path)


def _refuse_clashes(outputs: Outputs, sheet: bool) -> None:
    """Raise a UserError if an output would replace an input, another output or a folder that belongs to neither."""
    common = [outputs.folder / MANIFEST, *[outputs.folder / "sheet.png"] * sheet]
    common += [outputs.folder / "latents.safetensors"] * outputs.latents
    sources = {os.path.realpath(file.path) for file in outputs.files}
    for path in itertools.chain(common, *map(outputs.all, range(len(outputs.files)))):
        if os.path.realpath(path) in sources:
            raise UserError(f"{path} is an input and would be overwritten. Set output= to another folder.")
    for path in common:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file of this name is to be written. Rename it.")
    taken = set(common)
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
    import_plugins(cfg.plugins)  # a rank may be a new process
    if computes_on_cpu(cfg.accelerator):
        keep_freed_memory()
    spec = None
    dataset: Dataset[dict[str, Any]]
    space, average = "w_plus", None
    if plan.latents is not None:
        net = load_decoder(cfg.ckpt)
        latents = plan.latents.of(net.generator, str(cfg.ckpt), cfg.any_generator)
        space, average = latents.space, latents.lacking(net)
        dataset = LatentDataset(latents.codes, refinement_reader(cfg, latents, net.generator))
        inverter = Inverter()
    else:
        net = load_network(cfg)
        spec, size = _spec(cfg, net), _target_size(cfg, net)
        _warn_of_photographs(cfg, spec, plan)
        dataset = plan.inputs = InputDataset(plan.outputs.files, spec, cfg.factor, cfg.mask.dir, cfg.seed, size)
        inverter = build_inverter(cfg, net)
    check_width(cfg, net.generator.output_size)
    mask = None if cfg.mix.latent_mask is None else list(cfg.mix.latent_mask)
    with torch.inference_mode():
        frozen, reference = freeze_psp_generator(net), _reference(cfg, net)
        with naming(cfg, "mix"):
            inject = make_inject(frozen, mask, cfg.mix.n_outputs, cfg.mix.seed, reference)
    digest = generator_hash(net.generator) if cfg.latents else None
    # refinements of one batch may differ in kind and size
    batch_size = 1 if plan.latents is not None and has_refinements(cfg, plan.latents) else cfg.batch_size
    module = LitPredictor(
        _for_inference(cfg, net), inverter, mask, inject, cfg.mix.alpha, cfg.resize, cfg.mask.composite, space,
        average, cfg.compile, cfg.cuda_graphs, batch_size, keep=bool(cfg.latents),
    ).eval()  # fmt: skip
    writer = PredictionWriter(plan.outputs, spec, digest, str(cfg.ckpt))
    accelerator, devices = resolve_devices(cfg.accelerator, cfg.devices)
    world = count_devices(accelerator, devices) * count_nodes()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=count_nodes(),
        plugins=[cluster()],
        precision="32-true" if cfg.precision == "bf16" else cfg.precision,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,  # each rank gets its share below
        inference_mode=not steps(cfg),
        callbacks=[writer] + ([PredictionBar()] if cfg.progress_bar else []),
        enable_progress_bar=cfg.progress_bar,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, plan.todo[trainer.global_rank :: world]),
        batch_size=batch_size,
        num_workers=cfg.num_workers if plan.latents is None else 0,
        collate_fn=collate_inputs,
        pin_memory=torch.cuda.is_available(),
    )
    return trainer, module, loader, writer


def sheet_inputs(cfg: DictConfig, plan: PredictionPlan) -> InputDataset | None:
    """Return the inputs as the network sees them, or None if they are latents."""
    if plan.latents is None and plan.inputs is None:  # all outputs exist, or other processes made them
        spec = _spec(cfg, load_network(cfg))
        plan.inputs = InputDataset(plan.outputs.files, spec, cfg.factor, cfg.mask.dir, cfg.seed)
    return plan.inputs


def _for_inference(cfg: DictConfig, net: PSP) -> PSP:
    """Return the network in the form that the speed settings ask for; with autocast, this is the plain network."""
    if not cfg.fuse or cfg.precision.endswith("-mixed"):
        dtype = autocast_dtype(cfg.precision, computes_on_cpu(cfg.accelerator))
        net = freeze_psp_generator(net.to(memory_format=torch.channels_last), dtype)
    else:
        net = net.for_inference(torch.bfloat16 if cfg.precision == "bf16" else torch.float32, pack=not cfg.compile)
    if cfg.compile:
        net.generator = plain_generator(net.generator)
    return net


def _target_size(cfg: DictConfig, net: PSP) -> int | None:
    """Return the size in which an optimisation sees the images: the generator's; None without optimisation."""
    return net.generator.output_size if steps(cfg) else None


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
    check_source(cfg, spec)
    if cfg.factor is not None and spec.kind != "lowres":
        raise UserError(f"factor={cfg.factor} is for super-resolution; {cfg.ckpt} takes {spec.kind} images.")
    return spec


def _warn_of_photographs(cfg: DictConfig, spec: InputSpec, plan: PredictionPlan) -> None:
    """Warn if the first input of a one-channel network is in colour, because most such networks take line sketches."""
    if spec.kind != "sketch" or not plan.todo:
        return
    file = plan.outputs.files[plan.todo[0]].path
    with contextlib.suppress(UserError):  # an unreadable input becomes a record
        colours = np.asarray(open_image(file).convert("RGB").resize((64, 64)), dtype=np.float32)
        if np.ptp(colours, axis=-1).mean() > COLOURED:
            rank_zero_warn(
                f"{cfg.ckpt} takes grey pictures, but {file} is in colour; the output of a sketch network will be poor."
            )


def _reference(cfg: DictConfig, net: PSP) -> torch.Tensor | None:
    """Return the source whose styles are injected."""
    if cfg.mix.reference is None:
        return None
    if isinstance(net.encoder, nn.Identity):
        raise UserError(f"mix.reference needs an encoder; {cfg.ckpt} contains only a generator.")
    return load_source(cfg.mix.reference, _spec(cfg, net))

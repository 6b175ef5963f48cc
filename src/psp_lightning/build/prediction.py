"""Configuration of psp-predict to objects: the inputs, the network, the writer, the Trainer."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, Subset

from psp_lightning.build.checks import check_numbers
from psp_lightning.build.training import import_plugins, quiet
from psp_lightning.data.inputs import InputDataset, InputFile, LatentDataset, collate_inputs, list_inputs
from psp_lightning.data.masks import SHAPES
from psp_lightning.data.pairing import list_images
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.transforms import load_source
from psp_lightning.inference.frozen import AUTOCAST, freeze_psp_generator
from psp_lightning.latents.codes import generator_hash, load_decoder
from psp_lightning.latents.files import DESCRIBED, PLAIN, gather_latents, read_latents
from psp_lightning.lit.prediction import FORMATS, LitPredictor, PredictionBar, PredictionWriter, make_inject
from psp_lightning.lit.psp import gather
from psp_lightning.loading import load_psp
from psp_lightning.models.psp import PSP
from psp_lightning.utils.devices import resolve_devices
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.memory import computes_on_cpu, keep_freed_memory

PRECISIONS = ("32-true", "bf16", "bf16-mixed", "16-mixed")
NUMBERS: dict[str, tuple[type, float, float]] = {
    "resize": (int, 1, 2**15),
    "batch_size": (int, 1, math.inf),
    "num_workers": (int, 0, 1024),
    "factor": (int, 1, 2**15),
    "seed": (int, 0, math.inf),
    "mix.n_outputs": (int, 1, math.inf),
    "mix.alpha": (float, -math.inf, math.inf),
    "mix.seed": (int, 0, math.inf),
}


@dataclass
class PredictionPlan:
    """Which inputs there are, which need no work, where the manifest goes."""

    files: list[InputFile]
    todo: list[int]
    skipped: list[dict[str, Any]]
    manifest: Path
    writer: PredictionWriter

    def gather_latents(self, cfg: DictConfig, records: list[dict[str, Any]]) -> Path | None:
        """Write OUTPUT/latents.safetensors (or .npz): the codes of all inputs that have one; None: not asked for.

        Raises:
            UserError: what was skipped belongs to another generator.
        """
        good = sorted(record["index"] for record in records if record["status"] != "error")
        if not cfg.latents or not good:
            return None
        path = self.writer.folder / f"latents.{'npz' if cfg.latents == 'npz' else 'safetensors'}"
        gather_latents(path, [self.writer.latents_of(self.files[index]) for index in good])
        return path


@dataclass
class Prediction:
    """Everything that a rank of a prediction needs."""

    trainer: pl.Trainer
    module: LitPredictor
    loader: DataLoader[Any]
    writer: PredictionWriter

    def gather_records(self) -> list[dict[str, Any]]:
        """The manifest's records of all ranks."""
        return [record for share in gather(self.writer.records) for record in share]


def plan_prediction(cfg: DictConfig) -> PredictionPlan:
    """List the inputs and leave out what exists already.

    Raises:
        UserError: no input; an unknown format; an output folder that cannot be written.
    """
    if cfg.format not in FORMATS:
        options = ", ".join(FORMATS)
        raise UserError(f"format={cfg.format} is unknown.{suggest(cfg.format, FORMATS)} Choose from: {options}")
    if cfg.precision not in PRECISIONS:
        raise UserError(f"precision={cfg.precision} is unknown. Choose from: {', '.join(PRECISIONS)}")
    for key in ("side_by_side", "sheet", "overwrite", "any_generator", "fuse", "compile", "cuda_graphs"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]} must be true or false.")
    _check_speed(cfg)
    if cfg.latents not in (True, False, "safetensors", "npz"):
        raise UserError(f"latents={cfg.latents} must be true, false, safetensors or npz.")
    if not isinstance(cfg.mix.latent_mask, ListConfig | None):
        raise UserError(f"mix.latent_mask={cfg.mix.latent_mask} must be a list, e.g. [{cfg.mix.latent_mask}].")
    if cfg.mask.kind is not None and cfg.mask.kind not in SHAPES:
        raise UserError(
            f"mask.kind={cfg.mask.kind} is unknown.{suggest(cfg.mask.kind, SHAPES)} Choose from: {', '.join(SHAPES)}"
        )
    check_numbers(cfg, NUMBERS)
    output = Path(cfg.output)
    latents = holds_latents(cfg.input)
    files = _list_latents(cfg) if latents else list_inputs(str(cfg.input), exclude=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}.") from None
    writer = _writer(cfg, files, None, named=latents)
    _refuse_clashes(writer, files, cfg.sheet)
    results = [(*writer.outputs_of(file), *writer.extras_of(file)) for file in files]
    done = [not cfg.overwrite and all(path.exists() for path in paths) for paths in results]
    skipped = [writer.record(i, "skipped", writer.outputs_of(files[i]), 0.0) for i, skip in enumerate(done) if skip]
    todo = [i for i, skip in enumerate(done) if not skip]
    return PredictionPlan(files, todo, skipped, output / "manifest.jsonl", writer)


def _check_speed(cfg: DictConfig) -> None:
    """Raise a UserError for settings of speed that do not go together or lack something here."""
    mixed = str(cfg.precision).endswith("-mixed")
    if cfg.precision == "bf16" and not cfg.fuse:
        raise UserError("precision=bf16 goes with fuse=true; without it take precision=bf16-mixed.")
    if cfg.cuda_graphs and (cfg.accelerator in ("cpu", "mps") or not torch.cuda.is_available()):
        raise UserError("cuda_graphs=true needs a CUDA device; leave it out.")
    if cfg.cuda_graphs and (mixed or cfg.compile):
        raise UserError("cuda_graphs=true goes with precision=32-true or bf16, and without compile=true.")
    if cfg.compile and not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        raise UserError("compile=true needs a C++ compiler: install g++, or name one in CXX.")


def _for_inference(cfg: DictConfig, net: PSP) -> PSP:
    """The network as the settings of speed want it; autocast takes the plain one."""
    if not cfg.fuse or str(cfg.precision).endswith("-mixed"):
        net = net.to(memory_format=torch.channels_last)
        return net if cfg.compile else freeze_psp_generator(net, AUTOCAST.get(cfg.precision))
    return net.for_inference(torch.bfloat16 if cfg.precision == "bf16" else torch.float32, pack=not cfg.compile)


def holds_latents(path: Any) -> bool:
    """Whether `input` means a file of latents, by its suffix."""
    return Path(str(path)).suffix in (*DESCRIBED, *PLAIN)


def _list_latents(cfg: DictConfig) -> list[InputFile]:
    """The codes of `input` by their names.

    Raises:
        UserError: no file of latents; settings that are for images.
    """
    path = Path(str(cfg.input)).expanduser()
    image = {"side_by_side": cfg.side_by_side, "factor": cfg.factor is not None}
    image |= {"mask": cfg.mask.kind is not None or cfg.mask.dir is not None or cfg.mask.composite}
    if given := [key for key, value in image.items() if value]:
        raise UserError(f"{given[0]} is for images; input={cfg.input} holds latents.")
    latents = read_latents(path)
    results = {Path(cfg.output) / f"latents{suffix}" for suffix in DESCRIBED}
    if cfg.latents and path.resolve() in {result.resolve() for result in results}:
        raise UserError(f"latents={cfg.latents} would write over input={cfg.input}: give another output folder.")
    return [InputFile(path, name) for name in latents.names]


def _refuse_clashes(writer: PredictionWriter, files: list[InputFile], sheet: bool) -> None:
    """Raise a UserError where two results would be one file: a picture called sheet, a folder called side_by_side."""
    taken = {writer.folder / "sheet.png"} if sheet else set()
    for file in files:
        for path in (*writer.outputs_of(file), *writer.extras_of(file)):
            if path in taken:
                raise UserError(
                    f"{path} would be written twice (for {file.path}): rename the input or change the options."
                )
            taken.add(path)


def _writer(
    cfg: DictConfig, files: list[InputFile], spec: InputSpec | None, generator: str | None = None, named: bool = False
) -> PredictionWriter:
    return PredictionWriter(
        Path(cfg.output), files, spec, cfg.mix.n_outputs, cfg.format, cfg.side_by_side, bool(cfg.latents),
        generator, str(cfg.ckpt), named,
    )  # fmt: skip


def _spec(cfg: DictConfig, net: PSP) -> InputSpec:
    """What the network takes.

    Raises:
        UserError: settings that are for another kind of source.
    """
    values = dict(net.source)
    if cfg.mask.kind is not None:
        values["mask"] = {"kind": cfg.mask.kind}
    spec = InputSpec.from_dict(values)
    if spec.kind != "masked" and (cfg.mask.composite or cfg.mask.kind is not None or cfg.mask.dir is not None):
        raise UserError(f"mask.* is for inpainting; {cfg.ckpt} takes {spec.kind} images.")
    if cfg.factor is not None and cfg.factor > spec.size:
        raise UserError(f"factor={cfg.factor} is more than the {spec.size} pixels of the input.")
    if cfg.factor is not None and spec.kind != "lowres":
        raise UserError(f"factor={cfg.factor} is for super-resolution; {cfg.ckpt} takes {spec.kind} images.")
    return spec


def _reference(cfg: DictConfig, spec: InputSpec | None) -> torch.Tensor | None:
    """The picture whose styles are injected."""
    if cfg.mix.reference is None:
        return None
    if spec is None:
        raise UserError(f"mix.reference needs an encoder; {cfg.ckpt} is a generator alone.")
    return load_source(cfg.mix.reference, spec)


def build_prediction(cfg: DictConfig, plan: PredictionPlan) -> Prediction:
    """Network, inputs of this rank, writer, Trainer.

    Raises:
        UserError: whatever in the checkpoint, the inputs or the settings a person can mend.
    """
    quiet()
    import_plugins(cfg.plugins)
    if computes_on_cpu(cfg.accelerator):
        keep_freed_memory()
    latents = None
    if holds_latents(cfg.input):
        net = load_decoder(cfg.ckpt)
        latents = read_latents(str(cfg.input)).of(net.generator, str(cfg.ckpt), cfg.any_generator)
    else:
        net = load_psp(cfg.ckpt)
    spec = None
    dataset: Dataset[dict[str, Any]]
    if latents is not None:
        dataset = LatentDataset(latents.codes)
        spec = _spec(cfg, net) if net.source else None  # for mix.reference
    else:
        spec = _spec(cfg, net)
        masks = None if cfg.mask.dir is None else {p.stem: p for p in list_images(cfg.mask.dir, "mask folder")}
        dataset = InputDataset(plan.files, spec, cfg.factor, masks, cfg.seed)
    mask = None if cfg.mix.latent_mask is None else list(cfg.mix.latent_mask)
    with torch.inference_mode():
        inject = make_inject(net, mask, cfg.mix.n_outputs, cfg.mix.seed, _reference(cfg, spec))
    space, average = ("w_plus", None) if latents is None else (latents.space, latents.lacking(net))
    digest = generator_hash(net.generator) if cfg.latents else None
    net = _for_inference(cfg, net)
    module = LitPredictor(
        net, mask, inject, cfg.mix.alpha, cfg.resize, cfg.mask.composite, space, average, cfg.compile,
        cfg.cuda_graphs, cfg.batch_size,
    )  # fmt: skip
    writer = _writer(cfg, plan.files, spec, digest, latents is not None)
    accelerator, devices = resolve_devices(cfg.accelerator, cfg.devices)
    world = devices if isinstance(devices, int) else len(devices)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision="32-true" if cfg.precision == "bf16" else cfg.precision,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,  # each rank takes its own share below
        callbacks=[writer] + ([PredictionBar()] if cfg.progress_bar else []),
        enable_progress_bar=cfg.progress_bar,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(
        Subset(dataset, plan.todo[trainer.global_rank :: world]),
        batch_size=cfg.batch_size,
        num_workers=0 if latents is not None else cfg.num_workers,
        collate_fn=collate_inputs,
        pin_memory=torch.cuda.is_available(),
    )
    return Prediction(trainer, module, loader, writer)

"""Configuration of psp-predict to objects: the inputs, the network, the writer, the Trainer."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from psp_lightning.build import import_plugins, quiet
from psp_lightning.build_checks import check_numbers
from psp_lightning.checkpoints.io import load_psp
from psp_lightning.data.inputs import InputDataset, InputFile, collate_inputs, list_inputs
from psp_lightning.data.masks import SHAPES
from psp_lightning.data.pairing import list_images
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.transforms import load_source
from psp_lightning.lit.module import gather
from psp_lightning.lit.prediction import FORMATS, LitPredictor, PredictionBar, PredictionWriter, make_inject
from psp_lightning.utils.devices import resolve_devices
from psp_lightning.utils.errors import UserError, suggest

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
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
    for key in ("side_by_side", "sheet", "latents", "overwrite"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]} must be true or false.")
    if not isinstance(cfg.mix.latent_mask, ListConfig | None):
        raise UserError(f"mix.latent_mask={cfg.mix.latent_mask} must be a list, e.g. [{cfg.mix.latent_mask}].")
    if cfg.mask.kind is not None and cfg.mask.kind not in SHAPES:
        raise UserError(
            f"mask.kind={cfg.mask.kind} is unknown.{suggest(cfg.mask.kind, SHAPES)} Choose from: {', '.join(SHAPES)}"
        )
    check_numbers(cfg, NUMBERS)
    output = Path(cfg.output)
    files = list_inputs(str(cfg.input), exclude=output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}.") from None
    writer = _writer(cfg, files, None)
    _refuse_clashes(writer, files, cfg.sheet)
    results = [(*writer.outputs_of(file), *writer.extras_of(file)) for file in files]
    done = [not cfg.overwrite and all(path.exists() for path in paths) for paths in results]
    skipped = [writer.record(i, "skipped", writer.outputs_of(files[i]), 0.0) for i, skip in enumerate(done) if skip]
    return PredictionPlan(files, [i for i, skip in enumerate(done) if not skip], skipped, output / "manifest.jsonl")


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


def _writer(cfg: DictConfig, files: list[InputFile], spec: InputSpec | None) -> PredictionWriter:
    return PredictionWriter(Path(cfg.output), files, spec, cfg.mix.n_outputs, cfg.format, cfg.side_by_side, cfg.latents)


def build_prediction(cfg: DictConfig, plan: PredictionPlan) -> Prediction:
    """Network, inputs of this rank, writer, Trainer.

    Raises:
        UserError: whatever in the checkpoint, the inputs or the settings a person can mend.
    """
    quiet()
    import_plugins(cfg.plugins)
    net = load_psp(cfg.ckpt)
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
    masks = None if cfg.mask.dir is None else {p.stem: p for p in list_images(cfg.mask.dir, "mask folder")}
    reference = None if cfg.mix.reference is None else load_source(cfg.mix.reference, spec)
    mask = None if cfg.mix.latent_mask is None else list(cfg.mix.latent_mask)
    with torch.inference_mode():
        inject = make_inject(net, mask, cfg.mix.n_outputs, cfg.mix.seed, reference)
    module = LitPredictor(net, mask, inject, cfg.mix.alpha, cfg.resize, cfg.mask.composite)
    writer = _writer(cfg, plan.files, spec)
    accelerator, devices = resolve_devices(cfg.accelerator, cfg.devices)
    world = devices if isinstance(devices, int) else len(devices)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=cfg.precision,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,  # each rank takes its own share below
        callbacks=[writer] + ([PredictionBar()] if cfg.progress_bar else []),
        enable_progress_bar=cfg.progress_bar,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(
        Subset(InputDataset(plan.files, spec, cfg.factor, masks, cfg.seed), plan.todo[trainer.global_rank :: world]),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        collate_fn=collate_inputs,
    )
    return Prediction(trainer, module, loader, writer)

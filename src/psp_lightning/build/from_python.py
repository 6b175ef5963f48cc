"""Train an encoder from Python in one call, without a configuration."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from psp_lightning.build.trainer import quiet
from psp_lightning.checkpoints.read import read
from psp_lightning.data.datamodules import DATAMODULES, TaskDataModule
from psp_lightning.data.stores import FolderStore, ToyFacesStore
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.inference.frozen import autocast_dtype, freeze_psp_generator
from psp_lightning.lit.callbacks import (
    AverageBatchNorm,
    Curves,
    EpochStart,
    ImageGrids,
    LastCheckpoint,
    ProgressBar,
    ValidateEvery,
)  # fmt: skip
from psp_lightning.lit.distributed import cluster
from psp_lightning.lit.files import AtomicCheckpointIO, CsvLog
from psp_lightning.lit.psp import LitPSP
from psp_lightning.lit.run_folder import claimed, contains_run
from psp_lightning.lit.runs import FIT
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.losses import LOSSES, CompositeLoss, LossTerm
from psp_lightning.metrics.images import MSE, PSNR, IdSimilarity
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.optim.ranger import Ranger
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.devices import is_first_rank
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.memory import computes_on_cpu

PathLike = str | os.PathLike[str]
Data = PathLike | tuple[PathLike, PathLike] | ToyFaces | TaskDataModule
AGAIN = "Continue it with resume=True, or choose another folder."
LARGEST_INPUT = 256  # pixels; the paper's encoder takes no larger images, and larger outputs are pooled to this size


def ranger(parameters: Iterable[nn.Parameter]) -> Ranger:
    """Build the paper's optimizer with its learning rate."""
    return Ranger(parameters, lr=1e-4)


def fit(
    task: str,
    data: Data,
    *,
    run: PathLike,
    losses: Mapping[str, float | tuple[LossTerm, float]],
    generator: PathLike | nn.Module | tuple[nn.Module, Tensor] = "toyfaces/generator",
    steps: int = 500,
    val_every: int = 250,
    encoder: Callable[..., nn.Module] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = ranger,
    metrics: Mapping[str, Metric] | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    seed: int = 0,
    resume: bool = False,
    **trainer: Any,
) -> PSP:
    """Train an encoder for a frozen generator, and return the trained network.

    The run folder receives `checkpoints/best.ckpt` (lowest validation loss), `checkpoints/last.ckpt`,
    `csv/metrics.csv`, `curves.png` and `images/`. `psp-predict ckpt=RUN` and `PSP.from_checkpoint(RUN)` read it. Ctrl-C
    finishes the step, writes `last.ckpt` and returns; the same call with `resume=True` continues from there.

    Args:
        task: name of a task: `inversion`, `sketch2face`, `seg2face`, `superres`, `frontalization`, `inpainting` or
            `toonify`.
        data: a folder as in `data.root`; a pair (folder of sources, folder of targets); drawn faces, validated on 64
            faces of the next seed; or a data module, which then decides the batch size, the workers and the seed of
            its order.
        run: folder of this run, new unless `resume` is set.
        losses: loss name to weight, or to (loss term, weight) if the term needs arguments or is your own.
        generator: what `load_generator` reads, a generator, or (generator, average latent). Without an average latent,
            the mean of 10,000 random codes is used.
        steps: optimizer steps in total.
        val_every: optimizer steps between two validations; at most `steps`.
        encoder: called with `style_dim`, `in_channels`, `input_size` and, if it has this argument, `n_styles`. None:
            the gradual style encoder, with the paper's 50 layers for inputs of 128 px and more, otherwise with four
            residual blocks.
        optimizer: called with the encoder's parameters; the default is the paper's Ranger.
        metrics: validation metrics over (output, target) by name. None: MSE, PSNR, and the similarity of identities if
            the id loss is used.
        batch_size: samples per step and device.
        num_workers: processes that load the data; 0 loads in this one.
        seed: seed of the encoder's weights, the order of the data, the augmentation and the noise.
        resume: continue the run in `run`, bit for bit.
        **trainer: further arguments of `pytorch_lightning.Trainer`, such as `devices=2` or `precision="bf16-mixed"`.

    Returns:
        The network of the best checkpoint, in eval mode on the CPU.

    Raises:
        UserError: an argument makes no sense, the data do not fit the task, `run` contains a run already (or, with
            `resume`, none), or the loss became infinite or NaN.
    """
    quiet()
    run, last = Path(run), Path(run, "checkpoints", "last.ckpt")
    if resume and not last.is_file():
        raise UserError(f"There is no run to continue: {last} does not exist. Leave out resume=True.")
    if not resume and contains_run(run):
        raise UserError(f"{run} contains a run already. {AGAIN}")
    for key, own in (("max_steps", "steps"), ("val_check_interval", "val_every")):
        if key in trainer:
            raise UserError(f"fit takes {own}= instead of the Trainer's {key}=.")
    if not isinstance(losses, Mapping):
        raise UserError(f"losses={losses!r} must be a dict: name to weight, or name to (loss term, weight).")
    foreign = not isinstance(data, ToyFaces) and not str(generator).startswith("toyfaces/")
    if foreign and isinstance(losses.get("perceptual"), int | float):
        rank_zero_warn(
            "the loss 'perceptual' compares images with the network of the toy faces, which does not fit other images: "
            "give (PerceptualLoss(FILE), weight) or use 'lpips'."
        )
    if not callable(optimizer):
        raise UserError(f"optimizer={optimizer!r} must be a function from parameters to an optimizer.")
    steps = whole("steps", steps, 1)
    pl.seed_everything(whole("seed", seed, 0, 2**32 - 1), workers=True, verbose=False)
    network, latent_avg = _generator(generator)
    if not isinstance(data, TaskDataModule):
        size = min(network.output_size, LARGEST_INPUT)
        sizes = {"input_size": size, "target_size": size}
        data = _data_module(task, data, **sizes, batch_size=batch_size, num_workers=num_workers, seed=seed)
    net = _net(network, latent_avg, data, encoder or _default_encoder(data.spec.size))
    dtype = autocast_dtype(trainer.get("precision"), computes_on_cpu(trainer.get("accelerator", "auto")))
    objective = _objective(losses)
    module = LitPSP(
        freeze_psp_generator(net, dtype),
        objective,
        optimizer,
        metrics=_metrics(objective) if metrics is None else dict(metrics),
        total_steps=steps,
        source_is_target=data.source_is_target,
    )
    validate = min(whole("val_every", val_every, 1), steps)
    claim = claimed(run, resume, AGAIN) if is_first_rank() else contextlib.nullcontext()
    settings = {
        "task": {"name": task},
        "seed": seed,
        "trainer": {"max_steps": steps, "val_every": validate},
        "data": {"batch_size": batch_size},
        "loss": {name: {"weight": float(weight)} for name, weight in objective.weights.items()},
    }
    try:
        with claim:
            training = _trainer(run, resume, validate, max_steps=steps, **trainer)
            with _recorded(run, settings, training):
                training.fit(module, datamodule=data, ckpt_path=last if resume else None)
    except (TypeError, MisconfigurationException) as error:
        raise UserError(f"fit: {error}") from error
    interrupted = any(isinstance(item, LastCheckpoint) and item.interrupted for item in training.callbacks)  # type: ignore[attr-defined]
    if interrupted and training.is_global_zero:
        message = f"{run}: stopped at step {training.global_step} of {steps}; the same call with resume=True continues"
        print(message, file=sys.stderr)
    return load_psp(run)


@contextlib.contextmanager
def _recorded(run: Path, settings: dict[str, Any], training: pl.Trainer) -> Iterator[None]:
    """Record for psp-runs the settings of a run, and at its end its steps and its duration with all earlier parts."""
    if not training.is_global_zero:
        yield
        return
    file, start = run / FIT, monotonic()
    earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    before = (earlier or {}).get("seconds", 0.0)

    def write(**reached: Any) -> None:
        with replacing(file) as part:
            part.write_text(yaml.safe_dump({**settings, **reached}, allow_unicode=True, sort_keys=False), "utf-8")

    write(seconds=before)
    try:
        yield
    finally:
        write(seconds=round(before + monotonic() - start, 3), step=training.global_step)


def _generator(given: PathLike | nn.Module | tuple[nn.Module, Tensor]) -> tuple[Any, Tensor]:
    """Return the generator and its average latent."""
    if isinstance(given, tuple):
        return given
    network, average = (given, None) if isinstance(given, nn.Module) else load_generator(given)
    return network, network.latent_average(n=10_000) if average is None else average  # type: ignore[operator]


def _data_module(task: str, data: Any, **options: Any) -> TaskDataModule:
    """Build the data module of a task over folders or drawn faces."""
    if task not in DATAMODULES:
        raise UserError(f"There is no task '{task}'.{suggest(task, DATAMODULES)} All: {', '.join(DATAMODULES)}.")
    if isinstance(data, ToyFaces):
        size = options["target_size"]
        faces = ToyFacesStore(size, data.seed, data.n, data.identities, cache=True)
        others = ToyFacesStore(size, data.seed + 1, min(data.n, 64), cache=True)
        return DATAMODULES[task](faces, others, **options)
    folders = {"source": data[0], "target": data[1]} if isinstance(data, tuple) else {"root": data}
    train, val = FolderStore(**folders, part="train"), FolderStore(**folders, part="val")
    return DATAMODULES[task](train, val, **options)


def _default_encoder(input_size: int) -> Callable[..., nn.Module]:
    if input_size < 128:
        return partial(GradualStyleEncoder, blocks=(1, 1, 1, 1), width=16)
    return GradualStyleEncoder


def _net(generator: Any, latent_avg: Tensor, data: TaskDataModule, encoder: Callable[..., nn.Module]) -> PSP:
    if isinstance(encoder, nn.Module) or not callable(encoder):
        what = f"an instance of {type(encoder).__name__}" if isinstance(encoder, nn.Module) else repr(encoder)
        raise UserError(
            "encoder must be a class or a function that builds an encoder from n_styles, style_dim, in_channels and "
            f"input_size, not {what}."
        )
    derived = {"style_dim": generator.style_dim, "in_channels": data.spec.channels, "input_size": data.spec.size}
    if "n_styles" in inspect.signature(encoder).parameters:  # an encoder into W has one style
        derived["n_styles"] = generator.n_styles
    try:
        made = encoder(**derived)
    except TypeError as error:
        raise UserError(f"encoder: it is called with {', '.join(derived)}: {error}") from error
    return PSP(made, generator, latent_avg, source=data.spec.to_dict())


def _objective(losses: Mapping[str, float | tuple[LossTerm, float]]) -> CompositeLoss:
    terms, weights = {}, {}
    for name, value in losses.items():
        if isinstance(value, nn.Module):
            raise UserError(f"losses: '{name}' has no weight. Write {{'{name}': ({type(value).__name__}(...), 1.0)}}.")
        if isinstance(value, tuple):
            terms[name], weights[name] = value
        elif name in LOSSES:
            terms[name], weights[name] = LOSSES[name](), value
        else:
            raise UserError(f"There is no loss '{name}'.{suggest(name, LOSSES)} All: {', '.join(LOSSES)}.")
    return CompositeLoss(terms, weights)


def _metrics(objective: CompositeLoss) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {"mse": MSE(), "psnr": PSNR()}
    if "id" in objective.terms:
        metrics["id_similarity"] = IdSimilarity(objective.terms["id"].similarity)  # type: ignore[arg-type]
    return metrics


def _trainer(run: Path, resume: bool, val_every: int, **options: Any) -> pl.Trainer:
    checkpoints = run / "checkpoints"
    callbacks = [
        EpochStart(),
        AverageBatchNorm(),
        ValidateEvery(val_every),
        ModelCheckpoint(checkpoints, "best", monitor="val/loss", enable_version_counter=False),
        ImageGrids(run / "images", every_n_steps=0, n_images=4),
        Curves(run),
        *options.pop("callbacks", ()),
    ]
    if options.get("enable_progress_bar", True):
        callbacks.append(ProgressBar(refresh_rate=1))
    callbacks.append(LastCheckpoint(checkpoints, 100))  # last, because it stores the state of the others
    log = CsvLog(run / "csv")
    if resume:
        log.keep_until(read(checkpoints / "last.ckpt")["global_step"])
    own = {
        "max_epochs": -1,
        "val_check_interval": 1,  # ValidateEvery replaces it
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module gives each rank its share
        "enable_model_summary": False,
        "default_root_dir": run,
        "logger": log,
        "plugins": [AtomicCheckpointIO(), cluster()],
    }
    return pl.Trainer(**{**own, **options}, callbacks=callbacks)

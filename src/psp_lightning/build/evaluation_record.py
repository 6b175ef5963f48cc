"""The record of an evaluation and its files: what was measured, with what, and the numbers."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric
from tqdm.auto import tqdm

import psp_lightning
from psp_lightning.build.evaluation import IDENTITY, PAIRS, Subject
from psp_lightning.build.inversion import describe_steps, starts_from_average, steps
from psp_lightning.checkpoints.read import resolve
from psp_lightning.data.spec import source_to_rgb
from psp_lightning.lit.evaluation import LitEvaluator
from psp_lightning.lit.results import FORMAT, IMAGES, choose, delete_results, files_sha256, save_results, summary
from psp_lightning.utils.errors import UserError, plural
from psp_lightning.utils.images import save_atomic, to_pil
from psp_lightning.utils.memory import peak_memory, reset_peak_memory
from psp_lightning.zoo.locate import sha256

VERSIONS = ("torch", "torchmetrics", "pytorch-lightning", "torchvision", "numpy", "pillow", "lpips", "torch-fidelity")
DISPLAY = ("progress_bar", "num_workers", "output", "name")  # settings that do not affect the numbers
EDGE = 256  # pixels, longest side of the shown images


def check_output(cfg: DictConfig) -> None:
    """Make the folder for the results before anything is measured.

    Raises:
        UserError: the folder is a file, cannot be written, or lies in a folder of measured images, to which it would
            add images.
    """
    folder = Path(cfg.output)
    for key in ("outputs", "targets", "data.root", "data.source", "data.target"):
        home = OmegaConf.select(cfg, key)
        if cfg.images and home is not None and Path(home).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(
                f"output={folder} is in {key}={home}, so the next call would measure the images that this one writes. "
                "Choose another folder, or set images=0."
            )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file. Give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"output={folder} cannot be written. Choose another folder.")


def finish(cfg: DictConfig, subject: Subject, module: LitEvaluator, errors: dict[str, str]) -> dict[str, Any] | None:
    """Combine the values of all ranks, write the files and return the content of metrics.json; None on other ranks.

    Args:
        cfg: settings.
        subject: what was measured.
        module: module that measured it.
        errors: reasons why metrics could not be built, by the name of the metric.
    """
    columns, single, failed, missing = module.results(len(subject.names))
    if module.global_rank:
        return None
    rows: dict[str, Any] = {}
    empty = dict.fromkeys(("mean", "low", "high", "median", "n_images"))
    for name in map(str, cfg.metric):
        numbers: dict[str, Any] = dict(empty)
        lacking = {subject.names[index]: reason for index, reason in missing.get(name, {}).items()}
        if name in single:
            numbers |= {"mean": single[name], "n_images": len(subject.names)}
        error = {**errors, **failed}.get(name)
        if name in columns:
            try:
                numbers = summary(columns[name], cfg.seed)
            except ValueError as fault:
                counts = Counter(lacking.values()).most_common()
                error = " ".join([str(fault), *(f"{plural(n, 'image')}: {reason}." for reason, n in counts)])
        about = facts(module.metrics[name] if name in module.metrics else None)
        rows[name] = {**numbers, "missing": lacking, **about, "error": error}
    folder = Path(cfg.output)
    record = {
        "format": FORMAT,
        **describe(cfg, subject, module.device),
        **measure_cost(cfg, subject, module),
        "metrics": rows,
    }
    delete_results(folder)
    record["images"] = {"folder": IMAGES, "shown": save_images(cfg, subject, module, columns, folder)}
    save_results(folder, record, subject.names, columns)
    return record


def measure_cost(cfg: DictConfig, subject: Subject, module: LitEvaluator) -> dict[str, float | None]:
    """Return the seconds per image and the peak memory, both measured with one image at a time."""
    if subject.task == PAIRS or not cfg.timing:
        return {"seconds_per_image": None, "peak_memory_mib": None}
    items = [subject.dataset[index] for index in range(min(cfg.timing, len(subject.names)))]
    warm_up = 0 if steps(cfg) else 3  # an optimisation takes so long that the first image hardly differs
    reset_peak_memory(module.device)
    bar = tqdm([items[0]] * warm_up + items, "time", disable=not cfg.progress_bar)
    seconds = [module.one(item)[1] for item in bar][warm_up:]
    return {"seconds_per_image": statistics.median(seconds), "peak_memory_mib": peak_memory(module.device)}


def save_images(
    cfg: DictConfig, subject: Subject, module: LitEvaluator, columns: dict[str, list[float]], folder: Path
) -> list[dict[str, Any]]:
    """Write the best, median and worst images by the first metric that has values per image, and return a list."""
    if not columns:
        return []
    name = next(iter(columns))
    chosen = choose(columns[name], bool(module.metrics[name].higher_is_better), cfg.images)
    shown = []
    pairs = [(which, index) for which, indices in chosen.items() for index in indices]
    for which, index in tqdm(pairs, IMAGES, disable=not cfg.progress_bar):
        item = subject.dataset[index]
        pictures = {"target": item["target"], "output": module.one(item)[0][0]}
        if subject.spec is not None:
            pictures["source"] = source_to_rgb(item["source"][None], subject.spec)[0]
        entry = {"index": index, "name": subject.names[index], "which": which, "source": None}
        for kind, picture in pictures.items():
            image = to_pil(picture)
            image.thumbnail((EDGE, EDGE))
            entry[kind] = f"{IMAGES}/{index:06d}_{kind}.png"
            save_atomic(image, folder / str(entry[kind]))
        shown.append(entry)
    return shown


def row_name(cfg: DictConfig) -> str:
    """Return the name of the row: the `name` that is set, or a short form of what is measured."""
    if cfg.name is not None:
        return str(cfg.name)
    if cfg.outputs is not None:
        return Path(str(cfg.outputs)).name
    name = str(cfg.ckpt)
    if os.path.exists(name):
        path = Path(name).resolve()
        run = f"{path.parents[1].name}/" if path.parent.name == "checkpoints" else ""  # last.ckpt names no run
        name = path.name if path.is_dir() else f"{run}{path.stem}"
    return " + ".join(filter(None, [name, describe_steps(cfg)]))


def describe(cfg: DictConfig, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Return the part of metrics.json that says what was measured, and with what."""
    network = cfg.ckpt not in (None, IDENTITY)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    measured_with = {node["loss"] for node in settings["metric"].values() if "loss" in node}
    used = measured_with.union(*(settings[key]["losses"] for key in steps(cfg)))
    settings["loss"] = {term: settings["loss"][term] for term in sorted(used)}
    return {
        "name": row_name(cfg),
        "checkpoint": str(cfg.ckpt) if network else None,
        "checkpoint_sha256": sha256(resolve(str(cfg.ckpt), generator=starts_from_average(cfg))) if network else None,
        "task": subject.task,
        "as": cfg["as"],
        "n_images": len(subject.names),
        "files_sha256": files_sha256(subject.names),
        "settings": {
            **{key: value for key, value in settings.items() if key not in DISPLAY},
            "threads": torch.get_num_threads(),
            "device": str(device),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that its numbers depend on."""
    found = {"psp_lightning": psp_lightning.__version__}
    for name in VERSIONS:
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(metric: Metric | None) -> dict[str, Any]:
    """Return the entries of a metric in metrics.json that say how to read its values; None if it was not built."""
    higher = getattr(metric, "higher_is_better", None)
    return {
        "better": None if higher is None else "higher" if higher else "lower",
        "unit": getattr(metric, "unit", ""),
        "convention": getattr(metric, "convention", "" if metric is None else type(metric).__qualname__),
    }

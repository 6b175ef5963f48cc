"""Run folders as their files describe them: task, state, steps, best value and time."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from psp_lightning.lit.curves import LOG, Log, last_step, read_log
from psp_lightning.lit.run_folder import CLAIM, is_claimed
from psp_lightning.utils.errors import UserError, clean

STATES = ("running", "finished", "pruned", "interrupted", "damaged")
CONFIG, STARTED = "config.yaml", Path(".hydra", "config.yaml")  # the second one exists before the training starts
FIT = "fit.yaml"  # what `psp_lightning.fit` records, with the same keys as config.yaml
MARKS = (CONFIG, FIT, "train.log", LOG, "checkpoints")  # a folder that contains one of them is a run
OWN = {"checkpoints", "csv", "images", "tensorboard", "wandb"}  # folders of a run that contain no other run
LINE = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})\]\[([\w.]+)\]\[\w+\] - (.*)")
END = re.compile(r"(done: step|pruned: step|stopped at step) (\d+)")
RESUMED = re.compile(r"resuming at step \d+ from .*, written (\S+ \S+)")  # logged before the new part starts


@dataclass(frozen=True)
class Best:
    """The best value of the run so far.

    Attributes:
        name: the logged name that `callbacks.best` monitors, such as `val/loss`.
        mode: `min` or `max`.
    """

    name: str
    mode: str
    value: float
    step: int


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        folder: the run directory.
        name: the name that `run=` gave; for a run of a sweep, the names of the sweep's folder and of the run's folder.
        task: the task, `generator`, or an empty string if nothing says so.
        state: one of `STATES`.
        step: finished optimizer steps.
        steps: all steps, None if unknown.
        best: None if there was no validation.
        seconds: duration of the training in all its parts, None if unknown.
        changed: time of the last change, in seconds since the epoch.
        reason: what is damaged; otherwise empty.
        settings: the composed settings, nested.
        log: the logged values.
    """

    folder: Path
    name: str
    task: str
    state: str
    step: int
    steps: int | None
    best: Best | None
    seconds: float | None
    changed: float
    reason: str
    settings: dict[str, Any] = field(repr=False)
    log: Log = field(repr=False)


def is_run(folder: Path) -> bool:
    """Return whether a folder contains what a training writes."""
    return any((folder / mark).exists() for mark in MARKS)


def find_runs(folder: Path) -> list[Path]:
    """Return all run directories in a folder and its subfolders, sweeps' runs included, ordered by path."""
    found = []
    for place, folders, _ in os.walk(folder):
        run = is_run(Path(place))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (run and name in OWN))
        if run:
            found.append(Path(place))
    return found


def read_run(folder: Path, home: Path) -> Run:
    """Read a run. What cannot be read is left out, and `reason` says why.

    Args:
        folder: the run directory.
        home: the folder of all runs.
    """
    faults: list[str] = []
    settings = _read_settings(folder, faults)
    log: Log = {}
    try:
        if (folder / LOG).exists():
            log = read_log(folder / LOG)
    except (UserError, OSError) as error:
        faults.append(str(error))
    for file in sorted(folder.glob("checkpoints/*.ckpt")):
        if file.is_file() and not file.name.startswith(".") and not zipfile.is_zipfile(file):
            faults.append(f"{file} is incomplete.")
    times = [file.stat().st_mtime for file in (folder, folder / LOG, folder / "train.log") if file.exists()]
    task = _get(settings, "task", "name")
    changed = max(times[1:], default=times[0])
    ended, step, seconds = _read_messages(folder, changed)
    step = max(step, last_step(log), _number(settings.get("step")) or 0)
    steps = _number(_get(settings, "trainer", "max_steps"))
    if faults:
        state = "damaged"
    elif is_claimed(folder):
        state = "running"
    elif ended == "pruned: step":
        state = "pruned"
    else:
        state = "finished" if ended == "done: step" or (steps is not None and step >= steps) else "interrupted"
    if seconds is None and isinstance(settings.get("seconds"), int | float):
        seconds = float(settings["seconds"])
    return Run(
        folder=folder,
        name=run_name(folder, home),
        task=task if isinstance(task, str) else "",
        state=state,
        step=step,
        steps=steps,
        best=_best(settings, log),
        seconds=seconds,
        changed=changed,
        reason=clean(" ".join(faults), 400),
        settings=settings,
        log=log,
    )


def run_name(folder: Path, home: Path) -> str:
    """Return the name of a run: its path below `home`/TASK or `home`/multirun, or the name of its folder.

    The name of a sweep's run also contains the name of the sweep's folder, wherever it is.
    """
    parts = Path(os.path.relpath(folder, home)).parts
    inside = () if os.pardir in parts else parts[1:]
    sweep = folder.resolve().parent
    if len(inside) < 2 and (sweep / CLAIM).exists() and not is_run(sweep):
        inside = (sweep.name, folder.resolve().name)
    return "/".join(inside) or folder.resolve().name


def _read_settings(folder: Path, faults: list[str]) -> dict[str, Any]:
    for name in (CONFIG, FIT, STARTED):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, OSError) as error:
            faults.append(f"{file} cannot be read: {' '.join(str(error).split())}.")
            return {}
        if isinstance(content, dict):
            return content
        faults.append(f"{file} contains no settings.")
        return {}
    if (folder / "train.log").is_file() and (folder / "checkpoints").is_dir():
        faults.append(f"{folder / CONFIG} is missing.")
    return {}


def _get(settings: Any, *keys: str) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _best(settings: dict[str, Any], log: Log) -> Best | None:
    name = _get(settings, "callbacks", "best", "monitor") or "val/loss"
    mode = _get(settings, "callbacks", "best", "mode") or "min"
    points = log.get(name, np.empty((0, 2)))
    points = points[np.isfinite(points[:, 1])]
    if not len(points):
        return None
    step, value = points[(np.argmax if mode == "max" else np.argmin)(points[:, 1])]
    return Best(name, mode, float(value), int(step))


def _read_messages(folder: Path, changed: float) -> tuple[str, int, float | None]:
    """Return how the last part of a training ended, at which step, and the duration of all parts from train.log.

    Each resume adds a part. A part that was killed has no message at its end: it lasts until the checkpoint from which
    the next part resumes, or until its last message if that is later. The last part lasts until `changed`, the last
    change of the run's files.
    """
    if not (folder / "train.log").is_file():
        return "", 0, None
    ended, step, seconds, last = "", 0, 0.0, 0.0
    start: float | None = None
    for now, logger, text in _messages(folder / "train.log"):
        command = logger.startswith("psp_train")
        if command and "; run directory " in text:
            seconds += 0.0 if start is None else last - start
            start, last, ended = now, now, ""
        elif command and start is not None and (end := END.match(text)):
            ended, step, seconds, start = end[1], int(end[2]), seconds + now - start, None
        elif command and start is not None and (resumed := RESUMED.fullmatch(text)):
            last = max(last, datetime.fromisoformat(resumed[1]).timestamp())
        elif logger.startswith("psp_lightning.lit."):  # logged during a training, not before it
            last = now
    if start is not None:
        seconds += max(0.0, changed - start)
    return ended, step, seconds


def _messages(file: Path) -> Iterator[tuple[float, str, str]]:
    """Yield time, logger and text of each message."""
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if found := LINE.match(line):
                yield datetime.fromisoformat(found[1]).timestamp() + int(found[2]) / 1000, found[3], found[4]

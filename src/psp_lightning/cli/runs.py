"""psp-runs: list the runs below a folder, and compare some of them on one page."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psp_lightning.cli.settings import command, parse, split, verb
from psp_lightning.cli.table import print_table
from psp_lightning.lit.runs import Run, find_runs, is_run, read_run, run_name
from psp_lightning.utils.arguments import choice
from psp_lightning.utils.errors import UserError, plural, suggest
from psp_lightning.utils.progress import track

LIST = "psp-runs [list] [runs=DIR] [task=NAME] [sort=newest] [format=table]"
COMPARE = "psp-runs compare RUN RUN ... [out=comparison.html] [runs=DIR]"
SORTS = ("newest", "name", "task", "state", "steps", "best", "seconds")
FORMATS = ("table", "csv", "json")
COLUMNS = (
    "name", "task", "state", "step", "steps", "best_name", "best", "best_step", "seconds", "path", "reason"
)  # fmt: skip
HELP = f"""{LIST}
{COMPARE}

list     prints one line for each training below the folder of the runs, runs of sweeps included: name, task, state,
         finished steps of all, best value so far, seconds, and path. The state is running, finished, pruned,
         interrupted, or damaged, with the reason and exit status 1
compare  writes one page that opens offline: learning curves, best values, settings that differ, newest image grids.
         RUN is a name or a path. Runs of different tasks are compared in what they share

  psp-runs                                          all runs, the newest first
  psp-runs task=inversion sort=best                 the runs of a task, the best first
  psp-runs format=csv > runs.csv
  psp-runs compare first second out=two.html

runs     folder of the runs; default: the variable PSP_RUNS, or runs
task     list only the runs of this task; generator: runs of psp-train-generator
sort     {", ".join(SORTS)}; best puts the runs with the same kind of value together
format   {", ".join(FORMATS)}; csv and json have every digit
out      page to write; an existing page is replaced
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    named = bool(arguments) and split(arguments[0])[1] is None
    which = verb("psp-runs", arguments, ("list", "compare")) if named else "list"
    {"list": list_runs, "compare": compare}[which](arguments[1:] if named else arguments)


# --- list


def list_runs(arguments: list[str]) -> None:
    """Print the runs; exit with status 1 if one is damaged."""
    defaults = {"runs": _default_home(), "task": "", "sort": "newest", "format": "table"}
    values = parse(arguments, defaults, (), LIST)
    choice("sort", values["sort"], SORTS)
    choice("format", values["format"], FORMATS)
    home = _home(values["runs"])
    folders = find_runs(home)
    runs = [read_run(folder, home) for folder in track(folders, "reading", len(folders))]
    if values["task"]:
        tasks = sorted({one.task for one in runs if one.task})
        chosen = [one for one in runs if one.task == values["task"]]
        if not chosen and tasks:
            close = suggest(values["task"], tasks)
            raise UserError(f"{home} contains no run of the task '{values['task']}'.{close} Tasks: {', '.join(tasks)}.")
        runs = chosen
    runs = ordered(runs, values["sort"])
    PRINTERS[values["format"]](runs, home)
    if any(one.reason for one in runs):
        sys.exit(1)


def ordered(runs: Sequence[Run], sort: str) -> list[Run]:
    """Return the runs in the order that `sort` names; runs without the value come last."""

    def best(one: Run) -> tuple[Any, ...]:
        if one.best is None:
            return (True,)
        return (False, one.best.name, one.best.mode, one.best.value * (-1 if one.best.mode == "max" else 1))

    keys: dict[str, Any] = {
        "newest": lambda one: -one.changed,
        "name": lambda one: one.name,
        "task": lambda one: (not one.task, one.task),
        "state": lambda one: one.state,
        "steps": lambda one: -one.step,
        "best": best,
        "seconds": lambda one: (one.seconds is None, one.seconds or 0),
    }
    return sorted(sorted(runs, key=lambda one: (one.name, os.fspath(one.folder))), key=keys[sort])


def record(one: Run) -> dict[str, Any]:
    """Return what is known about a run by the names of the columns."""
    best = (None, None, None) if one.best is None else (one.best.name, one.best.value, one.best.step)
    seconds = None if one.seconds is None else round(one.seconds, 3)
    values = (one.name, one.task, one.state, one.step, one.steps, *best, seconds, os.fspath(one.folder), one.reason)
    return dict(zip(COLUMNS, values, strict=True))


def _print_table(runs: Sequence[Run], home: Path) -> None:
    if not runs:
        print(f"no runs in {home}")
        return
    rows = []
    for one in runs:
        steps = f"{one.step} of {'?' if one.steps is None else one.steps}"
        best = "" if one.best is None else f"{one.best.name} {one.best.value:.4g}"
        seconds = "" if one.seconds is None else f"{one.seconds:.0f}"
        rows.append([one.name, one.task, one.state, steps, best, seconds, os.fspath(one.folder), one.reason])
    rows.insert(0, ["name", "task", "state", "steps", "best", "seconds", "path", ""])
    print_table(rows, 400)


def _print_csv(runs: Sequence[Run], home: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record(one) for one in runs)
    print(text.getvalue(), end="")


def _print_json(runs: Sequence[Run], home: Path) -> None:
    print(json.dumps([record(one) for one in runs], indent=1))


PRINTERS = {"table": _print_table, "csv": _print_csv, "json": _print_json}

# --- compare


def compare(arguments: list[str]) -> None:
    """Write the page that compares runs; exit with status 1 if one of them is damaged."""
    from psp_lightning.cli.comparison import write_comparison
    from psp_lightning.cli.page import check_packages

    defaults = {"runs": _default_home(), "out": "comparison.html"}
    settings = [item for item in arguments if split(item)[0] in defaults and split(item)[1] is not None]
    values = parse(settings, defaults, (), COMPARE)
    names = [item for item in arguments if item not in settings]
    out = Path(values["out"]).expanduser()
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"out={out} must end in .html.")
    if out.is_dir():
        raise UserError(f"out={out} is a folder. Give a file.")
    home = _home(values["runs"], must_exist=False)
    folders = choose_runs(names, home)
    check_packages("psp-runs compare")
    runs = [read_run(folder, home) for folder in track(folders, "reading", len(folders))]
    faults = write_comparison(out, runs)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    print(f"{plural(len(runs), 'run')} compared: {out}")
    if faults:
        sys.exit(1)


def choose_runs(names: Sequence[str], home: Path) -> list[Path]:
    """Return the directories of the named runs: a path, a path below `home`, or the name in the list.

    Raises:
        UserError: there are fewer than two names, a name is unknown, fits several runs, or is given twice.
    """
    if len(names) < 2:
        given = f"only '{names[0]}' is given" if names else "none is given"
        raise UserError(f"a comparison needs at least two runs; {given}. Usage: {COMPARE}")
    found = find_runs(home) if home.is_dir() else []
    known: dict[str, list[Path]] = {}
    for folder in found:
        for name in {run_name(folder, home), os.path.relpath(folder, home)}:
            known.setdefault(name, []).append(folder)
    chosen: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        fitting = [path] if path.is_dir() and is_run(path) else known.get(name.rstrip("/"), [])
        if len(fitting) > 1:
            paths = " or ".join(os.path.relpath(folder, home) for folder in fitting)
            raise UserError(f"'{name}' is the name of {len(fitting)} runs. Write {paths}.")
        if not fitting:
            if path.is_dir():
                raise UserError(f"{path} is not the folder of a run.{_inside(path)}")
            key, value = split(name)
            if value is not None and suggest(key, ("out", "runs")):
                raise UserError(f"'{name}' is neither a run nor a setting.{suggest(key, ('out', 'runs'))}")
            close = suggest(name, known) or f" psp-runs runs={home} lists all runs."
            raise UserError(f"there is no run '{name}'.{close}")
        if any(fitting[0].resolve() == other.resolve() for other in chosen):
            raise UserError(f"'{name}' is given twice.")
        chosen += fitting
    return chosen


def _inside(path: Path) -> str:
    runs = find_runs(path)
    return f" It contains {plural(len(runs), 'run')}, such as {runs[0]}." if runs else ""


def _default_home() -> str:
    return os.environ.get("PSP_RUNS") or "runs"


def _home(folder: str, must_exist: bool = True) -> Path:
    home = Path(folder).expanduser()
    if must_exist and not home.is_dir():
        raise UserError(f"there is no folder {home}. Set runs=DIR to the folder of your runs.")
    return home


def main() -> None:
    """Entry point of `psp-runs`."""
    command(HELP, run, needs_arguments=False)


if __name__ == "__main__":
    main()

"""Statistics, tables and files of the measured figures."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.rows import FLOAT32, REFERENCE, Aim, Row

MIB = 1 << 20


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and extremes of repeated runs."""
    ordered = sorted(seconds)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered), "quartiles": [low, high], "least": ordered[0], "most": ordered[-1],
        "runs": len(ordered),
    }  # fmt: skip


def ratios(sides: Mapping[str, Any]) -> None:
    """Add comparisons with the reference to each side of a row.

    `faster` is the ratio of the medians and `faster_spread` the ratios of single rounds, both with the reference's runs
    of the same rounds (`beside`). `memory` is the share of the reference's peak.
    """
    base = sides.get(REFERENCE)
    for side in sides.values():
        if base is None or "beside" not in side:
            continue
        beside = side["beside"]
        side["faster"] = statistics.median(beside) / side["median"]
        side["faster_spread"] = spread([a / b for a, b in zip(beside, side["seconds"], strict=True)])
        if base.get("peak") and side.get("peak"):
            side["memory"] = side["peak"] / base["peak"]


def verdicts(aim: Aim, side: Mapping[str, Any]) -> list[str]:
    """Return each part of an aim and whether it was met."""
    parts = (
        ("faster", aim.faster, ">= {:g}x", lambda found, wanted: found >= wanted),
        ("memory", aim.memory, "<= {:.0%} memory", lambda found, wanted: found <= wanted),
        ("median", aim.seconds, "<= {:g} s", lambda found, wanted: found <= wanted),
        ("floor", aim.floor, "<= {:g}x floor", lambda found, wanted: found <= wanted),
    )
    said = []
    for key, wanted, form, holds in parts:
        if wanted is not None:
            result = "not measured" if key not in side else "met" if holds(side[key], wanted) else "missed"
            said.append(f"{form.format(wanted)}: {result}")
    return said


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _side_cells(side: Mapping[str, Any]) -> list[str]:
    if "median" not in side:
        return [side.get("not_measured", "not measured"), "", "", "", ""]
    low, high = side["quartiles"]
    times = f"{_duration(low)} - {_duration(high)} ({side['runs']})"
    faster = f"{side['faster']:.2f}x" if "faster" in side else ""
    if "faster_spread" in side:
        faster += f" ({side['faster_spread']['least']:.2f} - {side['faster_spread']['most']:.2f})"
    memory = f"{side['peak'] / MIB:.0f} MiB" if side.get("peak") else ""
    if "memory" in side:
        memory += f" ({side['memory']:.0%})"
    return [_duration(side["median"]), times, faster, memory, f"{side['floor']:.1f}x" if "floor" in side else ""]


def table(measured: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return a markdown table of all rows; a row without figures is marked "not measured"."""
    lines = [
        _line(["Row", "Side", "Median", "Quartiles (runs)", "Faster (rounds)", "Peak memory", "Of floor", "Aim"]),
        _line(["---"] * 8),
    ]
    for row in rows:
        found = measured.get(row.name)
        if row.kind == "kernels":
            if found is None or "failed" in found:
                aim = f">= {OF_COPY:.0%} of the copy bandwidth; >= {FASTER:g}x plain PyTorch: not measured"
                lines.append(_line([row.title, "", "not measured", "", "", "", "", aim]))
            continue  # kernels have a separate table
        sides: Mapping[str, Any] = {} if found is None else found["sides"]
        title = row.title if found is None else found.get("title", row.title)  # stored rows keep their title
        names = list(sides) or [side for side in row.sides if side in row.aims] or [""]
        for i, name in enumerate(names):
            side = sides.get(name, {"not_measured": "failed"} if found is not None and "failed" in found else {})
            aim = "; ".join(verdicts(row.aims[name], side)) if name in row.aims else ""
            lines.append(_line([title if i == 0 else "", name, *_side_cells(side), aim]))
    return "\n".join(lines)


OF_COPY, FASTER = 0.85, 1.0  # aims of each kernel: share of the copy bandwidth, speed relative to plain PyTorch


def kernel_table(kernels: Sequence[Mapping[str, Any]]) -> str:
    """Return a markdown table of the results of `measure_kernels`."""
    lines = [_line(["Kernel", "Type", "Time", "Of copy bandwidth", "Against plain PyTorch", "Aim"]), _line(["---"] * 6)]
    for kernel in kernels:
        met = kernel["of_copy"] >= OF_COPY and kernel["faster"] >= FASTER
        lines.append(_line([
            kernel["name"], kernel["dtype"], f"{1e6 * kernel['seconds']:.0f} us", f"{kernel['of_copy']:.0%}",
            f"{kernel['faster']:.2f}x", "met" if met else "missed",
        ]))  # fmt: skip
    return "\n".join(lines)


def to_update(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored results, whose rows a run like `results` may replace.

    Raises:
        SystemExit: there are no stored results, or they come from another machine or reference.
    """
    if not path.is_file():
        sys.exit(f"--update: there is no {path.name} yet. Run once without --only.")
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, what in (("machine", "machine or with other versions"), ("reference_commit", "reference")):
        if kept[key] != results[key]:
            sys.exit(f"--update: {path.name} was measured on another {what}. Run once without --only.")
    return kept


def updated(kept: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored results with the rows of `results`, each with its date. A failed row replaces none."""
    said = {key: results[key] for key in ("date", "commit")}
    rows = {name: {**row, **said} for name, row in results["rows"].items() if "failed" not in row}
    return {**kept, "rows": {**kept["rows"], **rows}}


def details(measured: Mapping[str, Any]) -> str:
    """List what the rows report besides their times: agreement of outputs, notes, parts of the prediction, kernels."""
    lines, notes = [], []
    for found in measured.values():
        if "date" in found:
            lines.append(f"- {found['title']}: measured {found['date']} at commit {found['commit']}")
        base = "the reference" if "median" in found.get("sides", {}).get(REFERENCE, {}) else FLOAT32
        for name, differences in found.get("agreement", {}).items():
            said = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
            lines.append(f"- {found['title']}, {name} against {base}, relative difference: {said}")
        notes += found.get("notes", [])
    return "\n".join([*(f"- {note}" for note in dict.fromkeys(notes)), *lines])


def markdown(results: Mapping[str, Any], rows: Sequence[Row], absent: Sequence[Row]) -> str:
    """Return the whole report."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    clones = {"this library": results.get("commit"), "the reference": results.get("reference_commit")}
    at = "".join(f", {name} at commit {commit}" for name, commit in clones.items() if commit)
    text = [f"Measured {results['date']}: {machine}{at}.", table(results["rows"], rows)]
    text += [kernel_table(found["kernels"]) for found in results["rows"].values() if "kernels" in found]
    if absent:
        text += ["Rows that need a GPU, not measured:", table({}, absent)]
    if said := details(results["rows"]):
        text.append(said)
    return "\n\n".join(text) + "\n"


BEGIN, END = (f"<!-- results of benchmarks.compare: {word} -->" for word in ("begin", "end"))


def refresh(page: Path, text: str) -> None:
    """Insert a report between the marks of a page."""
    old = page.read_text(encoding="utf-8")
    head, rest = old.split(BEGIN)
    _, tail = rest.split(END)
    write(page, f"{head}{BEGIN}\n{text}{END}{tail}")


def write(path: Path, content: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def save(folder: Path, name: str, results: Mapping[str, Any], text: str) -> list[Path]:
    """Write NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        paths.append(folder / f"{name}{suffix}")
        write(paths[-1], content)
    return paths

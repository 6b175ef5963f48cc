"""The numbers of an evaluation and their files: metrics.json, per_image.csv, and a table of several evaluations."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psp_lightning.utils.atomic import replacing

FORMAT = 1
METRICS, PER_IMAGE, REPORT, IMAGES = "metrics.json", "per_image.csv", "report.html", "images"
KINDS = ("source", "target", "output")  # kinds of the shown images
RESAMPLES, BLOCK = 2000, 1 << 18  # resamples of the bootstrap, and numbers drawn at once


def summary(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return mean, 95 % interval of the mean, median, all in float64, and the number of images that have a value.

    NaN means that an image has no value, for example no error inside a hole because it has no hole.

    The interval is the percentile bootstrap over images. Its draws depend only on `seed` and the number of values.

    Raises:
        ValueError: no image has a value, or a value is infinite.
    """
    x = np.asarray(values, np.float64)
    x = x[~np.isnan(x)]
    if not len(x):
        raise ValueError("no image has a value.")
    if np.isinf(x).any():
        raise ValueError(f"the value is infinite for {np.isinf(x).sum()} of {len(x)} images.")
    rng, means = np.random.default_rng(seed), []
    rows = max(1, BLOCK // len(x))
    for start in range(0, RESAMPLES, rows):
        chosen = rng.integers(0, len(x), (min(rows, RESAMPLES - start), len(x)))
        means.append(x[chosen].mean(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    mean = math.fsum(x) / len(x)
    return {"mean": mean, "low": float(low), "high": float(high), "median": float(np.median(x)), "n_images": len(x)}


def files_sha256(names: Sequence[str]) -> str:
    """Return the SHA-256 of the names of all images in order, each followed by a line feed."""
    text = "".join(f"{name}\n" for name in names)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def choose(values: Sequence[float], higher_is_better: bool, n: int) -> dict[str, list[int]]:
    """Return the indices of the `n` best, median and worst images, each image once; ties by index."""
    order = sorted(
        (i for i, value in enumerate(values) if not math.isnan(value)),
        key=lambda i: (-values[i] if higher_is_better else values[i], i),
    )
    best, worst = order[:n], order[max(n, len(order) - n) :]
    middle = order[len(best) : len(order) - len(worst)]
    start = max(0, (len(middle) - n) // 2)
    return {"best": best, "median": middle[start : start + n], "worst": worst}


def save_results(folder: Path, record: dict[str, Any], names: Sequence[str], columns: dict[str, list[float]]) -> None:
    """Write per_image.csv, then metrics.json, whose presence thereby shows that all other files are complete."""
    rows: list[list[Any]] = [["index", "name", *columns]]
    for index, name in enumerate(names):
        values = [column[index] for column in columns.values()]
        rows.append([index, name, *("" if math.isnan(value) else repr(value) for value in values)])
    _write(folder / PER_IMAGE, _csv(rows))
    _write(folder / METRICS, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def delete_results(folder: Path) -> None:
    """Delete what an earlier evaluation wrote, metrics.json first: without it, no other file counts as complete."""
    try:
        shown = load_results(folder)["images"]["shown"]
        images = [Path(entry[kind]).name for entry in shown for kind in KINDS if entry[kind]]
    except (OSError, ValueError, LookupError, TypeError):
        images = []
    for path in (METRICS, PER_IMAGE, REPORT, *(f"{IMAGES}/{name}" for name in images)):
        (folder / path).unlink(missing_ok=True)


def load_results(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's metrics.json."""
    record: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return record


def failure(name: str, reason: str) -> dict[str, Any]:
    """Return what stands in tables for an evaluation that has no results."""
    empty = dict.fromkeys(("n_images", "seconds_per_image", "peak_memory_mib"))
    return {"name": name, **empty, "metrics": {}, "error": " ".join(reason.split())}


def table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table with one row per evaluation: name, images, each metric with its interval, time and memory.

    If there is a `failure`, the last column has the reasons.
    """
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    units = {name: row["unit"] for record in records for name, row in record["metrics"].items()}
    heads = [f"{name}, {units[name]}" if units[name] else name for name in metrics]
    errors = [record.get("error") for record in records]
    rows = [["name", "images", *heads, "seconds per image", "peak memory, MiB", *(["error"] if any(errors) else [])]]
    for record, error in zip(records, errors, strict=True):
        cells = [_cell(record["metrics"].get(name), record["n_images"]) for name in metrics]
        time, memory = record["seconds_per_image"], record["peak_memory_mib"]
        ends = ["" if time is None else f"{time:.2g}", "" if memory is None else f"{memory:.0f}"]
        ends += [error or ""] if any(errors) else []
        rows.append([record["name"], "" if error else str(record["n_images"]), *cells, *ends])
    return rows


def _cell(row: dict[str, Any] | None, n_images: int) -> str:
    if row is None or row["mean"] is None:
        return "" if row is None else "not measured"
    interval = "" if row["low"] is None else f" [{row['low']:.4g}, {row['high']:.4g}]"
    share = "" if row["n_images"] == n_images else f", {row['n_images']} of {n_images}"
    return f"{row['mean']:.4g}{interval}{share}"


def without_value(row: dict[str, Any], n_images: int, shown: int = 10) -> str:
    """Return how many images a metric was measured on, and the names of the first others with the reasons."""
    names = [f"{name} ({reason})" for name, reason in row["missing"].items()]
    more = [f"and {len(names) - shown} more, see {METRICS}"] if len(names) > shown else []
    return f"{row['n_images']} of {n_images} images have a value; not {', '.join([*names[:shown], *more])}"


def markdown(rows: list[list[str]]) -> str:
    """Return a table in markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def save_table(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write table.md and table.csv to a folder; return the markdown. The csv file has all digits of each number."""
    text = markdown(table(records))
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    keys = ("mean", "low", "high", "median")
    rows: list[list[Any]] = [["name", "n_images", *(f"{name}_{key}" for name in metrics for key in keys),
                              "seconds_per_image", "peak_memory_mib", "error"]]  # fmt: skip
    for record in records:
        values = [record["metrics"].get(name, {}).get(key) for name in metrics for key in keys]
        numbers = [record["n_images"], *values, record["seconds_per_image"], record["peak_memory_mib"]]
        rows.append([record["name"], *("" if v is None else repr(v) for v in numbers), record.get("error", "")])
    _write(folder / "table.csv", _csv(rows))
    _write(folder / "table.md", text)
    return text


def save_rows(folder: Path, stem: str, rows: Sequence[Sequence[Any]]) -> str:
    """Write rows to `stem`.md and `stem`.csv in a folder; return the markdown.

    The csv file has all digits of each number, the markdown four. None becomes an empty cell, and a column without
    values is left out.
    """
    head, *body = rows
    used = [k for k in range(len(head)) if not body or any(row[k] is not None for row in body)]
    plain = [["" if row[k] is None else repr(row[k]) if isinstance(row[k], float) else row[k] for k in used]
             for row in rows]  # fmt: skip
    shown = [["" if row[k] is None else f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in used]
             for row in rows]  # fmt: skip
    text = markdown(shown)
    _write(folder / f"{stem}.csv", _csv(plain))
    _write(folder / f"{stem}.md", text)
    return text


def _csv(rows: list[list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8", "backslashreplace"))

"""Measure the shipped networks with psp-evaluate and write docs/results.md: `make results`.

Every row is a call of psp-evaluate. The numbers are kept in benchmarks/results/evaluation.json, and the tables of the
page are made from them: `python -m benchmarks.toyfaces.results --page` writes only the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psp_lightning.utils.atomic import replacing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
PAGE = ROOT / "docs" / "results.md"
SHIPPED = "mse,psnr,ssim,ms_ssim,perceptual,id_similarity,miou,frechet"
KEPT = ("mean", "low", "high", "median", "unit", "better")  # of each metric


@dataclass(frozen=True)
class Row:
    """A row of a table: its name, the table's name, and the arguments of psp-evaluate without folder and metrics."""

    name: str
    table: str
    metrics: str
    arguments: tuple[str, ...]


def rows() -> list[Row]:
    """Return all rows, cheap ones first."""

    def shipped(task: str, metrics: str, *more: str) -> Row:
        return Row(task, "tasks", metrics, (f"ckpt=toyfaces/{task}", *more))

    def refined(name: str, *settings: str) -> Row:
        start = ("ckpt=toyfaces/inversion", "data.limit=32", "timing=3", "batch_size=32")
        return Row(name, "optimisation", "mse,psnr,ssim,perceptual,id_similarity,miou", (*start, *settings))

    mixed = ("data.limit=100", "mix.latent_mask=[4,5,6,7,8,9]", "mix.n_outputs=4")
    return [
        shipped("inversion", SHIPPED),
        shipped("sketch2face", SHIPPED),
        shipped("seg2face", f"{SHIPPED},miou_labels"),
        shipped("superres", f"{SHIPPED},consistency", "factor=8"),
        Row("superres: the source itself", "tasks", "mse,psnr,ssim,ms_ssim,perceptual,id_similarity,miou,frechet",
            ("ckpt=identity", "task=superres", "factor=8")),
        Row("sketch2face, one output", "mixing", "miou", ("ckpt=toyfaces/sketch2face", "data.limit=100")),
        Row("sketch2face, four mixed outputs", "mixing", "miou,diversity", ("ckpt=toyfaces/sketch2face", *mixed)),
        refined("encoder"),
        *(refined(f"encoder, then {n} steps in W+", "refine=optimize", f"refine.steps={n}") for n in (20, 100, 500)),
        refined("average, then 500 steps in W+", "refine=optimize", "refine.steps=500", "refine.start=average"),
        refined("average, then 500 steps in W", "refine=optimize", "refine.steps=500", "refine.start=average",
                "refine.space=w"),
    ]  # fmt: skip


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Run psp-evaluate for a row and return what is kept of its metrics.json."""
    command = [sys.executable, "-m", "psp_lightning.cli.evaluate", *row.arguments, f"metric=[{row.metrics}]",
               f"output={folder}", "images=0", f"name='{row.name}'"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    metrics = {name: {key: values[key] for key in KEPT} for name, values in found["metrics"].items()}
    kept = ("checkpoint_sha256", "n_images", "files_sha256", "seconds_per_image", "versions")
    return {"table": row.table, "command": list(row.arguments), **{key: found[key] for key in kept}, "metrics": metrics}


def table(results: dict[str, Any], name: str) -> str:
    """Return a table of the results as markdown: means with their 95 % intervals."""
    chosen = {key: row for key, row in results.items() if row["table"] == name}
    metrics = list(dict.fromkeys(metric for row in chosen.values() for metric in row["metrics"]))
    units = {metric: values["unit"] for row in chosen.values() for metric, values in row["metrics"].items()}
    heads = ["", *(f"{metric}, {units[metric]}" if units[metric] else metric for metric in metrics), "s per image"]
    lines = [heads, ["---"] * len(heads)]
    for key, row in chosen.items():
        cells = [_cell(row["metrics"].get(metric)) for metric in metrics]
        seconds = row["seconds_per_image"]
        lines.append([key, *cells, "" if seconds is None else f"{seconds:.2g}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: dict[str, Any] | None) -> str:
    if values is None or values["mean"] is None:
        return ""
    text = f"{values['mean']:.3g}" if abs(values["mean"]) < 10 else f"{values['mean']:.1f}"
    if values["low"] is None:
        return text
    return f"{text} ± {(values['high'] - values['low']) / 2:.1g}"


def write_page(results: dict[str, Any]) -> None:
    """Insert the tables between the marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name in dict.fromkeys(row["table"] for row in results.values()):
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(results, name)}\n{end}{rest.split(end)[1]}"
    with replacing(PAGE) as part:
        part.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, or only write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.toyfaces.results", description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page from the stored numbers")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure the rows whose names start so")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="folder for the evaluations")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for number, row in enumerate(rows()):
        if not given.page and (given.only is None or row.name.startswith(tuple(given.only))):
            print(f"{row.name}:", flush=True)
            results[row.name] = measure(row, given.folder.resolve() / str(number))
    results = {row.name: results[row.name] for row in rows() if row.name in results}
    with replacing(RESULTS) as part:
        part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(results)


if __name__ == "__main__":
    main()

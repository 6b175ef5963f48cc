"""Measure networks of the drawn faces with psp-evaluate and write docs/results.md: `make results`.

Every row is a call of psp-evaluate. `--training` (`make results-training`) first trains the networks of the paper's
ablation and of frontalization, three times each; it continues where it stopped. The numbers are kept in
benchmarks/results/evaluation.json, and the tables of the page are made from them: `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psp_lightning.utils.atomic import replacing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.json"
PAGE = ROOT / "docs" / "results.md"
MEASURED = "mse,psnr,ssim,ms_ssim,perceptual,id_similarity,miou,frechet"
KEPT = ("mean", "low", "high", "median", "unit", "better")  # kept values of each metric
SEEDS = (1, 2, 3)
ENCODERS = {  # rows of the paper's table 1 and their experiments
    "encoder into W": "toyfaces_ablation_w",
    "naive encoder into W+": "toyfaces_ablation_w_plus",
    "gradual style encoder, no id loss": "toyfaces_ablation_gradual",
    "gradual style encoder, id loss": "toyfaces_ablation_gradual_id",
    "e4e": "toyfaces_e4e",  # these two are from later papers
    "ReStyle, three passes": "toyfaces_restyle",
}
# channels of the stem and residual units of the stages, with steps that take as long as 3,000 steps of the first one
SIZES: dict[str, tuple[str, ...]] = {
    "16 channels, units 1-1-1-1": (),  # the training of the ablation
    "16 channels, units 1-2-4-3": ("encoder.blocks=[1,2,4,3]", "trainer.max_steps=2800", "model.decay_steps=1400"),
    "24 channels, units 1-1-1-1": ("encoder.width=24", "trainer.max_steps=2500", "model.decay_steps=1250"),
    "24 channels, units 1-2-4-3": (
        "encoder.width=24", "encoder.blocks=[1,2,4,3]", "trainer.max_steps=2200", "model.decay_steps=1100",
    ),
    "32 channels, units 1-1-1-1": ("encoder.width=32", "trainer.max_steps=2200", "model.decay_steps=1100"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        experiment, seed: what to train first; None: nothing. The rows of one name are trained with different seeds.
        settings: additional settings of the training.
        arguments: of psp-evaluate, without folder, metrics and, if something is trained, checkpoint.
    """

    name: str
    table: str
    metrics: str
    arguments: tuple[str, ...]
    experiment: str | None = None
    seed: int | None = None
    settings: tuple[str, ...] = ()

    @property
    def run(self) -> str:
        """Name of the run in which the network is trained; rows of equal trainings share it."""
        name = re.sub(r"\W+", "_", self.name) + "_" if self.settings else ""
        return f"{str(self.experiment).removeprefix('toyfaces_')}_{name}{self.seed}"

    @property
    def key(self) -> str:
        """Name in the file of results."""
        return f"{self.table}: {self.name}" + ("" if self.seed is None else f", seed {self.seed}")


def shipped_rows() -> list[Row]:
    """Return the rows that measure the shipped networks, cheap ones first."""

    def task(name: str, metrics: str, *more: str) -> Row:
        return Row(name, "tasks", metrics, (f"ckpt=toyfaces/{name}", *more))

    def refined(name: str, *settings: str, ckpt: str = "toyfaces/inversion") -> Row:
        start = (f"ckpt={ckpt}", "data.limit=32", "timing=3", "batch_size=32")
        return Row(name, "optimisation", "mse,psnr,ssim,perceptual,id_similarity,miou", (*start, *settings))

    optimised = ("refine=optimize", "refine.losses.perceptual=0.1")
    mixed = ("data.limit=100", "mix.latent_mask=[4,5,6,7,8,9]", "mix.n_outputs=4")
    return [
        task("inversion", MEASURED),
        task("inversion_refined", MEASURED),
        task("sketch2face", MEASURED),
        task("seg2face", f"{MEASURED},miou_labels"),
        task("superres", f"{MEASURED},consistency", "factor=8"),
        Row("superres: the source itself", "tasks", MEASURED, ("ckpt=identity", "task=superres", "factor=8")),
        Row("sketch2face, one output", "mixing", "miou", ("ckpt=toyfaces/sketch2face", "data.limit=100")),
        Row("sketch2face, four mixed outputs", "mixing", "miou,diversity", ("ckpt=toyfaces/sketch2face", *mixed)),
        refined("encoder"),
        refined("encoder and refiner", ckpt="toyfaces/inversion_refined"),
        *(refined(f"encoder, then {n} steps in W+", *optimised, f"refine.steps={n}") for n in (20, 100, 500)),
        refined("average, then 500 steps in W+", *optimised, "refine.steps=500", "refine.start=average"),
        refined("average, then 500 steps in W", *optimised, "refine.steps=500", "refine.start=average",
                "refine.space=w"),
    ]  # fmt: skip


def trained_rows() -> list[Row]:
    """Return the rows for which networks are trained, one seed after the other."""
    pose = "pose,mse,psnr,perceptual,id_similarity,miou"
    frontal = ("task=frontalization", "timing=0")  # trainings may run beside it
    rows = [
        Row("the source itself", "frontalization", pose, ("ckpt=identity", *frontal)),
        Row("inversion", "frontalization", pose, ("ckpt=toyfaces/inversion", *frontal)),
    ]
    for seed in SEEDS:
        for name, experiment in ENCODERS.items():
            rows.append(Row(name, "ablation", MEASURED, ("timing=0",), experiment, seed))
        rows.append(Row("frontalization", "frontalization", pose, frontal, "toyfaces_frontalization", seed))
    experiment = ENCODERS["gradual style encoder, id loss"]
    rows += [Row(name, "sizes", MEASURED, ("timing=0",), experiment, 1, settings) for name, settings in SIZES.items()]
    return rows


def train(row: Row, folder: Path) -> Path:
    """Train the network of a row, or continue or skip its training, and return its last checkpoint."""
    assert row.experiment is not None
    command = [sys.executable, "-m", "psp_lightning.cli.train", f"experiment={row.experiment}", f"seed={row.seed}",
               *row.settings, f"paths.runs={folder}", f"run={row.run}", "resume=auto"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    (checkpoint,) = folder.glob(f"*/{row.run}/checkpoints/last.ckpt")
    return checkpoint


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Train if necessary, run psp-evaluate for a row, and return what is kept of its metrics.json."""
    arguments = list(row.arguments)
    if row.experiment is not None:
        arguments.insert(0, f"ckpt={train(row, folder / 'runs')}")
    output = folder / re.sub(r"\W+", "_", row.key)
    command = [sys.executable, "-m", "psp_lightning.cli.evaluate", *arguments, f"metric=[{row.metrics}]",
               f"output={output}", "images=0", f"name={row.name}"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    metrics = {name: {key: values[key] for key in KEPT} for name, values in found["metrics"].items()}
    kept = ("checkpoint_sha256", "n_images", "files_sha256", "seconds_per_image", "versions")
    values = {"name": row.name, "table": row.table, "experiment": row.experiment, "seed": row.seed,
              "arguments": list(row.arguments)}  # fmt: skip
    return {**values, **{key: found[key] for key in kept}, "metrics": metrics}


def table(results: dict[str, Any], name: str) -> str:
    """Return a table of the results as markdown.

    A value is a mean over images ± half of its 95 % interval, or, for several trainings, the mean over them ± their
    standard deviation. A table with trained networks says how many trainings there were.
    """
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in results.values():
        if row["table"] == name:
            chosen.setdefault(row["name"], []).append(row)
    all_metrics = [row["metrics"] for rows in chosen.values() for row in rows]
    units = {metric: values["unit"] for metrics in all_metrics for metric, values in metrics.items()}
    trained = any(row["seed"] for rows in chosen.values() for row in rows)
    heads = ["", *(f"{metric}, {unit}" if unit else metric for metric, unit in units.items())]
    heads.append("trainings" if trained else "ms per image")  # trainings may run beside each other, so no times
    lines = [heads, ["---"] * len(heads)]
    for key, rows in chosen.items():
        cells = [_cell([row["metrics"][metric] for row in rows if metric in row["metrics"]]) for metric in units]
        seconds = rows[0]["seconds_per_image"]
        if trained:
            last = str(len(rows)) if rows[0]["seed"] else ""
        else:
            last = "" if seconds is None else f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f}"
        lines.append([key, *cells, last])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(found: list[dict[str, Any]]) -> str:
    means = [values["mean"] for values in found]
    if not means or None in means:
        return ""
    mean = statistics.mean(means)
    digits = next((digits for digits, low in enumerate((10, 1, 0.1), 1) if abs(mean) >= low), 4)
    if len(means) > 1:
        spread = statistics.stdev(means)
    elif found[0]["low"] is None:
        return f"{mean:.{digits}f}"
    else:
        spread = (found[0]["high"] - found[0]["low"]) / 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def page(text: str, results: dict[str, Any]) -> str:
    """Return the text of the page with the tables between their marks."""
    for name in dict.fromkeys(row["table"] for row in results.values()):
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(results, name)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """Measure, or only write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.toyfaces.results", description=__doc__)
    parser.add_argument("--training", action="store_true", help="measure newly trained networks, not the shipped ones")
    parser.add_argument("--page", action="store_true", help="only write the page from the stored numbers")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure only the rows whose names start with ROW")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="folder for trainings and evaluations")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    rows = [*shipped_rows(), *trained_rows()]
    for row in trained_rows() if given.training else shipped_rows():
        if not given.page and (given.only is None or row.name.startswith(tuple(given.only))):
            print(f"{row.key}:", flush=True)
            results[row.key] = measure(row, given.folder.resolve())
            results = {row.key: results[row.key] for row in rows if row.key in results}
            with replacing(RESULTS) as part:
                part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(PAGE.read_text(encoding="utf-8"), results)
    with replacing(PAGE) as part:
        part.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()

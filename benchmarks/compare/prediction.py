"""Measurements of psp-predict over a folder, of its parts, and of the import time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.compare.comparison import Comparison
from benchmarks.compare.report import spread
from benchmarks.compare.rows import BFLOAT16, FLOAT32, Row
from benchmarks.compare.worker import ROOT, WorkerError

PRECISION = {FLOAT32: "32-true", BFLOAT16: "bf16"}
IMPORTS = {
    "torch alone": "import torch",
    "import psp_lightning": "import psp_lightning",
    "from psp_lightning import PSP": "from psp_lightning import PSP",
}
REFERENCE_IMPORT = "from benchmarks.compare.reference import enter; enter(Path({clone!r}), 'cpu'); import models.psp"


def measure_import(clone: Path | None, rounds: int) -> dict[str, Any]:
    """Measure imports in turns, each in a new process; the first round fills the file cache and does not count."""
    statements = dict(IMPORTS)
    if clone is not None:
        statements["reference: models.psp, nothing compiled"] = REFERENCE_IMPORT.format(clone=str(clone))
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(rounds + 1):
        for name, statement in statements.items():
            code = f"import time; from pathlib import Path; t = time.perf_counter(); {statement}; "
            done = _run([sys.executable, "-c", code + "print(time.perf_counter() - t)"])
            if turn > 0:
                seconds[name].append(float(done.split()[-1]))
    return {name: {"seconds": found, **spread(found)} for name, found in seconds.items()}


def _run(command: list[str]) -> str:
    """Run a command and return its output."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{' '.join(command)}: status {done.returncode}\n" + done.stderr[-2000:])
    return done.stdout


def write_images(folder: Path, n: int, size: int = 256) -> None:
    """Write `n` smooth random images of `size` pixels: noise at 32 pixels, enlarged."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng()
    for i in range(n):
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")


def measure_prediction(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Measure the seconds per file of psp-predict without its start, and of its parts one after the other.

    The command also runs on a single file, and the difference leaves out the start.
    """
    n = row.files
    many, one = comparison.scratch / "many", comparison.scratch / "one"
    write_images(many, n)
    write_images(one, 1)
    found: dict[str, Any] = {"sides": {}, "notes": []}
    checkpoint = comparison.job(row, FLOAT32).files["psp"]
    accelerator = "gpu" if comparison.device == "cuda" else "cpu"
    for side, precision in PRECISION.items():
        if side == BFLOAT16 and not comparison.bfloat16:
            continue
        whole = {}
        for folder in (one, many):
            start = time.perf_counter()
            _run([
                sys.executable, "-m", "psp_lightning.cli.predict", f"ckpt={checkpoint}", f"input={folder}",
                f"output={folder}_{side}", f"precision={precision}", f"accelerator={accelerator}", "progress_bar=false",
            ])  # fmt: skip
            whole[folder] = time.perf_counter() - start
        parts = comparison.once(row, side, "predict")
        each, total = (whole[many] - whole[one]) / (n - 1), sum(parts.values())
        found["sides"][side] = {"seconds": [each], **spread([each]), "parts": parts, "whole": whole[many], "files": n}
        said = " + ".join(f"{name} {1e3 * value:.0f}" for name, value in parts.items())
        found["notes"].append(
            f"psp-predict, {side}: {1 / each:.2f} files/s ({1e3 * each:.0f} ms a file); the sum of its parts "
            f"{1 / total:.2f} files/s ({said} = {1e3 * total:.0f} ms); the whole command {whole[many]:.1f} s, on one "
            f"file {whole[one]:.1f} s"
        )
    return found

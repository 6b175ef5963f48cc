"""Measure the cost of `MKL_CBWR=AUTO,STRICT`, which the commands set: `python -m benchmarks.reproducible`.

Run rows of `benchmarks.compare` for this library in float32, in turns with and without the setting.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import closing
from pathlib import Path

from benchmarks.compare.__main__ import chosen
from benchmarks.compare.comparison import Comparison
from benchmarks.compare.machine import describe
from benchmarks.compare.rows import FLOAT32, rows, scale_for
from benchmarks.compare.worker import Worker
from psp_lightning.utils.reproducibility import VALUE, VARIABLE

SETTINGS = {"with": VALUE, "without": ""}


def main() -> None:
    """Measure and print the chosen rows."""
    parser = argparse.ArgumentParser("python -m benchmarks.reproducible", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ROW", default=["train-256", "generator-1024", "image-1024-b1"])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(describe("cpu"), flush=True)
    with tempfile.TemporaryDirectory(prefix="reproducible") as scratch:
        comparison = Comparison("cpu", None, Path(scratch))
        for row in chosen(rows(scale_for("cpu", False, None), "cpu"), given.only):
            comparison.write_weights(row)
            job = comparison.job(row, FLOAT32)
            seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
            with (
                closing(Worker(job, {VARIABLE: SETTINGS["with"]})) as first,
                closing(Worker(job, {VARIABLE: SETTINGS["without"]})) as second,
            ):
                workers = dict(zip(SETTINGS, (first, second), strict=True))
                for worker in workers.values():
                    worker.ready()
                    for _ in range(row.warmup):
                        worker.ask("run", seed=0)
                for turn in range(given.rounds):
                    for name in list(workers)[:: 1 if turn % 2 else -1]:
                        for _ in range(row.before):
                            workers[name].ask("run", seed=turn)
                        seconds[name].append(workers[name].ask("run", seed=turn)["seconds"])
            ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            print(
                f"{row.name}: with {medians['with']:.3f} s, without {medians['without']:.3f} s, "
                f"ratio {medians['with'] / medians['without']:.2f} (rounds {min(ratios):.2f} - {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()

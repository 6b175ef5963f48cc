"""Compare the speed of this checkout with an earlier one, in turns on the same inputs."""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.compare import machine
from benchmarks.compare.comparison import Comparison, worker
from benchmarks.compare.rows import BFLOAT16, FLOAT32, Row
from benchmarks.compare.worker import ROOT

KINDS = ("generator", "encoder", "image", "train")


def measure_change(before: Path, wanted: list[Row], device: str, rounds: int | None) -> int:
    """Print, for each row and precision, the median ratio of speeds (before / now in seconds) and of peak memory.

    Both checkouts run in turns, each in a separate process, with the same weights and inputs.

    Args:
        before: the earlier checkout.
        wanted: the rows; those without a network are left out.
        device: cpu or cuda.
        rounds: number of rounds of every row; None: the most that the row allows.

    Returns:
        0.
    """
    if not (before / "benchmarks" / "compare" / "worker.py").is_file():
        sys.exit(f"--before {before} is not a checkout of this repository.")
    print(f"before: {machine.commit(before)}, now: {machine.commit(ROOT)}")
    print("| Row | Side | before | now | faster | memory | largest difference |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="compare") as scratch:
        comparison = Comparison(device, None, Path(scratch))
        for row in wanted:
            if row.kind in KINDS:
                comparison.write_weights(row)
                for side in (FLOAT32, BFLOAT16) if comparison.bfloat16 else (FLOAT32,):
                    print(_measure(comparison, row, side, before, rounds or row.rounds[1]), flush=True)
    return 0


def _measure(comparison: Comparison, row: Row, side: str, before: Path, rounds: int) -> str:
    import torch

    seconds: tuple[list[float], list[float]] = ([], [])
    peaks, seed = [0, 0], random.randrange(2**31)
    outputs = [comparison.scratch / f"{name}.out" for name in ("before", "now")]
    with ExitStack() as stack:
        job = comparison.job(row, side)
        workers = [stack.enter_context(worker(job, root)) for root in (before, ROOT)]
        for process, output in zip(workers, outputs, strict=True):
            process.ready()
            process.ask("check", seed=seed, path=str(output))
            for _ in range(row.warmup):
                process.ask("run", seed=seed)
        for turn in range(rounds):
            seed = random.randrange(2**31)
            for i in (0, 1) if turn % 2 else (1, 0):
                for _ in range(row.before):
                    workers[i].ask("run", seed=seed)
                found = workers[i].ask("run", seed=seed)
                seconds[i].append(found["seconds"])
                peaks[i] = max(peaks[i], found["peak"])
    a, b = (torch.load(output, weights_only=True) for output in outputs)
    difference = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    medians = [statistics.median(values) for values in seconds]
    ratios = sorted(x / y for x, y in zip(*seconds, strict=True))
    faster = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return (
        f"| {row.name} | {side} | {medians[0]:.3f} s | {medians[1]:.3f} s | {faster} | {peaks[1] / peaks[0]:.1%} | "
        f"{difference:.1e} |"
    )

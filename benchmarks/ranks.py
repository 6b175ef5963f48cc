"""Steps per second of one and of two processes on this machine, for the same images per step.

    python -m benchmarks.ranks [--rounds 3] [SETTINGS of psp-train]

Each round trains with one process and then with two, in turns, so that other work on the machine slows both. Each
process has one thread. The figure of a run is the median step after the first ten.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

BATCH, STEPS, FIRST = 8, 40, 10


class StepTimes(Callback):
    """Writes the time at the end of each step to `path`, on the first rank."""

    def __init__(self, path: str) -> None:
        self.path, self.times = Path(path), list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.times))


def steps_per_second(processes: int, settings: list[str]) -> float:
    """Train with `BATCH` images per step and return the steps per second."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times.json")
        command = [
            sys.executable, "-m", "psp_lightning.cli.train", "trainer=cpu", "trainer.strategy=auto",
            f"trainer.devices={processes}", f"data.batch_size={BATCH // processes}", f"trainer.max_steps={STEPS}",
            "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "callbacks.images=null",
            "callbacks.best=null", "data.num_workers=0", f"paths.runs={folder}",
            f"+callbacks.times={{_target_: benchmarks.ranks.StepTimes, path: {times}}}", *settings,
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        ends = json.loads(times.read_text())
    return 1 / statistics.median(b - a for a, b in zip(ends[FIRST:], ends[FIRST + 1 :], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=3)
    options, settings = parser.parse_known_args()
    ratios = []
    for number in range(options.rounds):
        one, two = (steps_per_second(processes, settings) for processes in (1, 2))
        ratios.append(two / one)
        print(f"round {number + 1}: {one:.2f} and {two:.2f} steps per second, ratio {two / one:.2f}", flush=True)
    print(f"two processes: {statistics.median(ratios):.2f} times the steps per second of one")


if __name__ == "__main__":
    main()

"""Set up each side of a row in a separate process, compare their outputs and run them in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, report
from benchmarks.compare.agreement import compare
from benchmarks.compare.rows import BFLOAT16, FLOAT32, REFERENCE, REFERENCE_KEPT, Job, Row
from benchmarks.compare.worker import ROOT, OutOfMemory, Worker

NO_BFLOAT16 = "not measured: the processor has no bfloat16"


class Comparison:
    """A run of the script.

    Args:
        device: cpu or cuda.
        clone: the clone of the reference; None: measure only this library.
        scratch: folder for weights and images.
        overrides: additional settings of psp-train.
        rounds: number of rounds of every row; None: as defined by the row.
    """

    def __init__(
        self, device: str, clone: Path | None, scratch: Path, overrides: list[str] | None = None,
        rounds: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.clone, self.scratch = device, clone, scratch
        self.overrides, self.rounds = overrides or [], rounds
        self.bfloat16 = device == "cuda" or machine.has_bfloat16()

    def job(self, row: Row, side: str, kind: str | None = None) -> Job:
        """Return the set-up of a worker for one side of a row."""
        suffix = "safetensors" if self.clone is None else "pt"  # layout of this library, or of the reference
        files = {
            "psp": f"psp_{row.size}.{suffix}",
            "alexnet": "alexnet.pth",
            "ir_se50": "ir_se50.pth",
            "images": "many",
        }
        files = {name: str(self.scratch / file) for name, file in files.items()}
        if self.clone is not None:
            files["clone"] = str(self.clone)
        return Job(kind or row.kind, row.size, row.batch, side, self.device, files, self.overrides)

    def once(self, row: Row, side: str, kind: str) -> Any:
        """Run one request in a new worker and return its result."""
        with worker(self.job(row, side, kind)) as process:
            process.ready()
            return process.ask("run", seed=0)["result"]

    def write_weights(self, row: Row) -> None:
        """Write random weights for the row once; if there is a reference, it writes the weights of the network."""
        files = self.job(row, FLOAT32).files
        if self.clone is not None and not Path(files["psp"]).exists():
            self.once(row, REFERENCE, "weights")
        if not all(Path(files[name]).exists() for name in ("psp", "alexnet", "ir_se50")):
            self.once(row, FLOAT32, "weights")

    def measure_sides(self, row: Row) -> dict[str, Any]:
        """Set up the sides, compare their outputs and run them in turns.

        If the reference runs out of memory, measure only this library.
        """
        try:
            return self.measure_beside(row, [] if self.clone is None else [REFERENCE])
        except OutOfMemory as error:
            if error.side != REFERENCE:
                raise
        found = self.measure_beside(row, [])
        found["sides"] = {REFERENCE: {"not_measured": "out of memory"}, **found["sides"]}
        return found

    def measure_beside(self, row: Row, base: list[str]) -> dict[str, Any]:
        """Measure the sides of this library together with those of `base`, the reference or none."""
        found: dict[str, Any] = {"sides": {}, "agreement": {}, "notes": []}
        ours = [side for side in row.sides if base or side != REFERENCE_KEPT]
        able = [side for side in ours if side != BFLOAT16 or self.bfloat16]
        outputs: dict[str, Path] = {}
        seed = random.randrange(2**31)
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for phase in [[side] for side in able] if row.apart else [able]:
                new = [side for side in [*base, *phase] if side not in workers]
                for side in new:
                    workers[side] = stack.enter_context(worker(self.job(row, side)))
                    found["notes"] += workers[side].ready()["notes"]
                    outputs[side] = self.scratch / f"{row.name}.{len(outputs)}.out"
                    workers[side].ask("check", seed=seed, path=str(outputs[side]))
                    for _ in range(row.warmup):
                        workers[side].ask("run", seed=seed)
                found["agreement"] |= compare(outputs, row, self.device)
                self.take_turns(row, {side: workers[side] for side in [*base, *phase]}, found["sides"])
                for side in phase:
                    workers.pop(side).close()
        for side in ours:
            found["sides"].setdefault(side, {"not_measured": NO_BFLOAT16})
        report.ratios(found["sides"])
        return found

    def take_turns(self, row: Row, workers: dict[str, Worker], sides: dict[str, Any]) -> None:
        """Run the workers in turns, round by round, and store the figures of each side in `sides`."""
        least, most = (self.rounds, self.rounds) if self.rounds else row.rounds
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        names = list(workers)
        start = time.monotonic()
        for turn in range(most):
            if turn >= least and time.monotonic() - start > row.seconds:
                break
            seed = random.randrange(2**31)
            shift = turn % len(names)  # so that no side always runs after the same one
            for side in names[shift:] + names[:shift]:
                for _ in range(row.before):
                    workers[side].ask("run", seed=seed)
                runs[side].append(workers[side].ask("run", seed=seed))
        for side, of_side in runs.items():
            seconds = [run["seconds"] for run in of_side]
            figures: dict[str, Any] = {"seconds": seconds, "peak": max(run["peak"] for run in of_side)}
            if side == REFERENCE and side in sides:  # from an earlier phase
                figures["seconds"] = sides[side]["seconds"] + seconds
                figures["peak"] = max(figures["peak"], sides[side]["peak"])
            elif side != REFERENCE and REFERENCE in runs:
                figures["beside"] = [run["seconds"] for run in runs[REFERENCE]]
            sides[side] = {**figures, **report.spread(figures["seconds"])}
            if lowest := workers[side].ask("floor"):
                sides[side] |= {"floor": sides[side]["median"] / lowest["floor_seconds"], **lowest}


@contextmanager
def worker(job: Job, root: Path = ROOT) -> Iterator[Worker]:
    """Start a worker that runs the code of the checkout `root`, and always end it."""
    process = Worker(job, root=root)
    try:
        yield process
    finally:
        process.close()

"""Measures this library against a clone of the reference implementation: `python -m benchmarks.compare --help`."""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, report
from benchmarks.compare.agreement import compare
from benchmarks.compare.prediction import measure_import, measure_prediction
from benchmarks.compare.rows import BFLOAT16, FLOAT32, REFERENCE, REFERENCE_KEPT, Job, Row, rows, scale_for
from benchmarks.compare.worker import ROOT, OutOfMemory, Worker, WorkerError

NO_BFLOAT16 = "not measured: the processor has no bfloat16"
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"


class Comparison:
    """One run of the script.

    Args:
        device: cpu or cuda.
        clone: the reference; None: ours alone.
        scratch: folder for weights and images.
        overrides: further settings of psp-train.
        rounds: of every row; None: as the row says.
    """

    def __init__(
        self, device: str, clone: Path | None, scratch: Path, overrides: list[str] | None = None,
        rounds: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.clone, self.scratch = device, clone, scratch
        self.overrides, self.rounds = overrides or [], rounds
        self.bfloat16 = device == "cuda" or machine.has_bfloat16()

    def job(self, row: Row, side: str, kind: str | None = None) -> Job:
        """What a worker sets up for one side of a row."""
        suffix = "safetensors" if self.clone is None else "pt"  # ours, or the reference's layout
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
        """What a worker finds that does one thing and ends."""
        with worker(self.job(row, side, kind)) as process:
            process.ready()
            return process.ask("run", seed=0)["result"]

    def write_weights(self, row: Row) -> None:
        """Random weights for the row, once; the reference writes the network's, where there is one."""
        files = self.job(row, FLOAT32).files
        if self.clone is not None and not Path(files["psp"]).exists():
            self.once(row, REFERENCE, "weights")
        if not all(Path(files[name]).exists() for name in ("psp", "alexnet", "ir_se50")):
            self.once(row, FLOAT32, "weights")

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row."""
        if row.kind == "import":
            return {"sides": measure_import(self.clone, self.rounds or row.rounds[0])}
        if row.kind == "kernels":
            return {"kernels": self.once(row, FLOAT32, "kernels")["kernels"]}
        self.write_weights(row)
        if row.kind == "predict":
            return measure_prediction(self, row)
        return self.measure_sides(row)

    def measure_sides(self, row: Row) -> dict[str, Any]:
        """Set up the sides, compare their outputs, then let them take turns; where the reference has too little memory,
        ours alone."""
        try:
            return self.measure_beside(row, [] if self.clone is None else [REFERENCE])
        except OutOfMemory as error:
            if error.side != REFERENCE:
                raise
        found = self.measure_beside(row, [])
        found["sides"] = {REFERENCE: {"not_measured": "out of memory"}, **found["sides"]}
        return found

    def measure_beside(self, row: Row, base: list[str]) -> dict[str, Any]:
        """Our sides and those of `base`: the reference, or none."""
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
        """Run the workers in turns, round by round, and put the figures of each side into `sides`."""
        least, most = (self.rounds, self.rounds) if self.rounds else row.rounds
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        names = list(workers)
        start = time.monotonic()
        for turn in range(most):
            if turn >= least and time.monotonic() - start > row.seconds:
                break
            seed = random.randrange(2**31)
            shift = turn % len(names)  # so that no side always runs behind the same one
            for side in names[shift:] + names[:shift]:
                for _ in range(row.before):
                    workers[side].ask("run", seed=seed)
                runs[side].append(workers[side].ask("run", seed=seed))
        for side, of_side in runs.items():
            seconds = [run["seconds"] for run in of_side]
            figures: dict[str, Any] = {"seconds": seconds, "peak": max(run["peak"] for run in of_side)}
            if side == REFERENCE and side in sides:  # an earlier phase's
                figures["seconds"] = sides[side]["seconds"] + seconds
                figures["peak"] = max(figures["peak"], sides[side]["peak"])
            elif side != REFERENCE and REFERENCE in runs:
                figures["beside"] = [run["seconds"] for run in runs[REFERENCE]]
            sides[side] = {**figures, **report.spread(figures["seconds"])}
            if lowest := workers[side].ask("floor"):
                sides[side] |= {"floor": sides[side]["median"] / lowest["floor_seconds"], **lowest}


@contextmanager
def worker(job: Job) -> Iterator[Worker]:
    """A worker that is ended in any case."""
    process = Worker(job)
    try:
        yield process
    finally:
        process.close()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--reference", type=Path, help="clone of eladrich/pixel2style2pixel; without it: ours alone")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows (or what their names begin with)")
    parser.add_argument("--out", type=Path, help="folder of compare_DEVICE.json and .md (default: benchmarks/results)")
    parser.add_argument("--update", action="store_true", help="put the rows of --only into the kept results")
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two: to see that it runs")
    parser.add_argument("--files", type=int, help="images for psp-predict (default: 200 on a GPU, 16 on a CPU)")
    parser.add_argument("--rounds", type=int, help="rounds of every row (default: as time allows, 2 to 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return parser.parse_args(argv)


def chosen(all_rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows that `--only` means; ends the program where a name means none."""
    if only is None:
        return all_rows
    for name in only:
        if not any(row.name.startswith(name) for row in all_rows):
            sys.exit(f"--only {name}: no such row. Rows: {', '.join(row.name for row in all_rows)}")
    return [row for row in all_rows if any(row.name.startswith(name) for name in only)]


def main(argv: list[str] | None = None) -> int:
    """Entry point; status 1 where a row failed or outputs differ."""
    given = arguments(argv)
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if given.reference is not None:
        from benchmarks.compare.reference import missing

        if lacking := missing(given.reference):
            sys.exit(f"--reference {given.reference} is no clone of eladrich/pixel2style2pixel: no {lacking[0]}.")
    if given.update and (given.only is None or given.quick or given.out or given.reference is None):
        sys.exit("--update goes with --only and --reference, and not with --quick or --out.")
    scale = scale_for(device, given.quick, given.files)
    every = rows(scale, device)
    wanted = chosen(every, given.only)
    clone = None if given.reference is None else given.reference.resolve()
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(device),
        "commit": machine.commit(ROOT),
        "reference_commit": clone and machine.commit(clone),
        "quick": given.quick,
        "rows": {},
    }
    kept = report.to_update(RESULTS / f"compare_{device}.json", results) if given.update else {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="compare") as scratch:
        comparison = Comparison(device, clone, Path(scratch), rounds=given.rounds)
        for i, row in enumerate(wanted, 1):
            print(f"[{i}/{len(wanted)}] {row.name}: {row.title}", flush=True)
            start = time.monotonic()
            try:
                found = comparison.measure(row)
            except WorkerError as error:
                failed = True
                found = {"sides": {}, "failed": str(error)}
                print(f"  failed: {error}", file=sys.stderr)
            results["rows"][row.name] = {"title": row.title, **found}
            for line in report.table({row.name: results["rows"][row.name]}, [row]).splitlines()[2:]:
                print(f"  {line}", flush=True)
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
    if given.update:
        results, wanted = report.updated(kept, results), every
    on_gpu = rows(scale_for("cuda", False, None), "cuda") if device == "cpu" else []
    text = report.markdown(results, wanted, [row for row in on_gpu if row.aims or row.kind == "kernels"])
    print("\n" + text)
    whole = given.update or given.only is None and not given.quick and clone is not None
    if given.out is not None or whole:
        for path in report.save(given.out or RESULTS, f"compare_{device}", results, text):
            print(path)
    if whole and given.out is None:
        pages = sorted(RESULTS.glob("compare_*.md"))
        report.refresh(PAGE, "\n".join(path.read_text(encoding="utf-8") for path in pages))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

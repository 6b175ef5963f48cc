"""Compare the speed of this library with a clone of the reference: `python -m benchmarks.compare --help`."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, report
from benchmarks.compare.before import measure_change
from benchmarks.compare.comparison import Comparison
from benchmarks.compare.prediction import measure_import, measure_prediction
from benchmarks.compare.rows import FLOAT32, Row, rows, scale_for
from benchmarks.compare.worker import ROOT, WorkerError

PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"


def measure(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Return the figures of a row."""
    if row.kind == "import":
        return {"sides": measure_import(comparison.clone, comparison.rounds or row.rounds[0])}
    if row.kind == "kernels":
        return {"kernels": comparison.once(row, FLOAT32, "kernels")["kernels"]}
    comparison.write_weights(row)
    if row.kind == "predict":
        return measure_prediction(comparison, row)
    return comparison.measure_sides(row)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--reference", type=Path, help="clone of pixel2style2pixel; default: this library only")
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT",
        help="an earlier checkout of this repository; prints how much faster each row is now, and saves nothing",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to measure, or prefixes of their names")
    parser.add_argument("--out", type=Path, help="folder for compare_DEVICE.json and .md (default: benchmarks/results)")
    parser.add_argument("--update", action="store_true", help="replace the rows of --only in the stored results")
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two: checks that all runs")
    parser.add_argument("--files", type=int, help="images for psp-predict (default: 200 on a GPU, 16 on a CPU)")
    parser.add_argument("--rounds", type=int, help="number of rounds of every row (default: 2 to 15, as time allows)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    return parser.parse_args(argv)


def chosen(all_rows: list[Row], only: list[str] | None) -> list[Row]:
    """Return the rows that `--only` selects; end the program if a name selects none."""
    if only is None:
        return all_rows
    for name in only:
        if not any(row.name.startswith(name) for row in all_rows):
            sys.exit(f"--only {name}: no such row. Choose from: {', '.join(row.name for row in all_rows)}")
    return [row for row in all_rows if any(row.name.startswith(name) for name in only)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the rows; return 1 if a row failed or outputs differ."""
    given = arguments(argv)
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if given.reference is not None:
        from benchmarks.compare.reference import missing

        if lacking := missing(given.reference):
            sys.exit(
                f"--reference {given.reference} is not a clone of eladrich/pixel2style2pixel: {lacking[0]} is missing."
            )
    if given.update and (given.only is None or given.quick or given.out or given.reference is None):
        sys.exit("--update needs --only and --reference, and excludes --quick and --out.")
    scale = scale_for(device, given.quick, given.files)
    every = rows(scale, device)
    wanted = chosen(every, given.only)
    if given.before is not None:
        if given.reference or given.update or given.out:
            sys.exit("--before can only be combined with --only, --rounds, --quick and --device.")
        return measure_change(given.before.resolve(), wanted, device, given.rounds)
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
                found = measure(comparison, row)
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
    measured = device == "cuda" or (RESULTS / "compare_cuda.json").is_file()
    on_gpu = [] if measured else rows(scale_for("cuda", False, None), "cuda")
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

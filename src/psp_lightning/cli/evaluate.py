"""psp-evaluate: measure a network, or the images of any tool."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli.help import answer
from psp_lightning.cli.launch import launch
from psp_lightning.cli.mistakes import guard, message, user_errors
from psp_lightning.cli.settings import quote_text, separate
from psp_lightning.utils.devices import check_launched, count_devices, count_nodes, is_first_rank, started_rank
from psp_lightning.utils.errors import UserError, plural

OmegaConf.register_new_resolver("psp_conf", config_root, replace=True)
records: dict[str, dict[str, Any]] = {}  # by folder: metrics.json of the jobs of this process, or their failure
folders: list[str] = []  # folders of the jobs of a sweep


def evaluate_job(cfg: DictConfig) -> dict[str, Any]:
    """Measure this rank's share of the images; rank 0 writes the files. Return the content of metrics.json."""
    from psp_lightning.build.evaluation import build_evaluation, build_subject
    from psp_lightning.build.evaluation_record import check_output, finish
    from psp_lightning.build.trainer import run_prediction
    from psp_lightning.lit.distributed import gather

    subject = build_subject(cfg)
    check_output(cfg)
    trainer, module, loader, errors = build_evaluation(cfg, subject)
    run_prediction(trainer, module, loader)
    record: dict[str, Any] = gather(finish(cfg, subject, module, errors))[0]
    return record


@hydra.main(version_base="1.3", config_path=os.path.join(config_root(), "evaluation"), config_name="evaluate")
@user_errors
def _run(cfg: DictConfig) -> None:
    from psp_lightning.build.evaluation_record import row_name
    from psp_lightning.lit.results import METRICS, failure, markdown, table

    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        if cfg.name is None:
            cfg.name = ", ".join([row_name(cfg), *_swept()])
        cfg.output = _job_folder(cfg.output, str(cfg.name))
    try:
        record = records[cfg.output] = _evaluate(cfg)
    except Exception as error:
        records[cfg.output] = failure(str(cfg.name), message(error) or type(error).__name__)
        raise
    if not is_first_rank():
        return
    if not sweep:
        print(markdown(table([record])), end="")
    folder = Path(cfg.output)
    page = _report(folder, [folder])
    print(f"{plural(record['n_images'], 'image')}; {page or folder / METRICS}")


def _evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure, print which values are missing, and return the content of metrics.json."""
    from psp_lightning.build.evaluation import check_settings, count_ranks
    from psp_lightning.build.instantiate import import_plugins
    from psp_lightning.lit.results import without_value

    check_settings(cfg)
    import_plugins(cfg.plugins)
    wanted = count_devices(cfg.accelerator, cfg.devices)
    check_launched(wanted, None, "devices")
    if (ranks := count_ranks(cfg, world := wanted * count_nodes())) < world:
        if (given := started_rank()) is not None:
            raise UserError(
                f"{given.launcher} started {world} processes, but the images fill only {plural(ranks, 'batch')} of "
                f"{cfg.batch_size}. Start at most {ranks}, or set a smaller batch_size."
            )
        wanted = cfg.devices = ranks
    record: dict[str, Any] = launch(evaluate_job, cfg, wanted)
    for name, row in record["metrics"].items() if is_first_rank() else ():
        if row["error"]:
            print(f"error: {name}: {row['error']}", file=sys.stderr)
        elif row["missing"]:
            print(f"{name}: {without_value(row, record['n_images'])}", file=sys.stderr)
    return record


def _swept() -> list[str]:
    """Return the settings of this job that vary in the sweep and that `row_name` does not show."""
    parse = OverridesParser.create().parse_overrides
    varied = {item.key_or_group for item in parse(separate(sys.argv[1:])[1]) if item.is_sweep_override()}
    varied -= {"ckpt", "outputs", "refine", "refine.steps"}
    job = parse(HydraConfig.get().overrides.task)
    return [f"{item.key_or_group}={item.value()}" for item in job if item.key_or_group in varied]


def _job_folder(folder: str, name: str) -> str:
    """Return a folder for a job of a sweep that no other job of the sweep has."""
    path = os.path.join(folder, re.sub(r"[^\w.-]+", "_", name).strip(".") or "_")
    path = next(p for p in itertools.chain([path], (f"{path}_{k}" for k in itertools.count(2))) if p not in folders)
    folders.append(path)
    return path


def _report(folder: Path, evaluations: list[Path], failed: Sequence[dict[str, Any]] = ()) -> Path | None:
    """Write report.html and return its path, or say what is missing and return None."""
    from psp_lightning.cli.page import check_packages
    from psp_lightning.cli.report import write_report
    from psp_lightning.lit.results import REPORT

    try:
        check_packages(REPORT)
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr)
        return None
    write_report(folder / REPORT, evaluations, failed)
    return folder / REPORT


def _save_sweep() -> None:
    """Write the table and the report of all jobs, and print the table."""
    from psp_lightning.lit.results import REPORT, save_table

    folder = Path(os.path.dirname(folders[0]))
    folder.mkdir(parents=True, exist_ok=True)
    print(save_table(folder, list(records.values())), end="")
    failed = [record for record in records.values() if "error" in record]
    page = None
    if len(failed) < len(records):
        page = _report(folder, [Path(path) for path, record in records.items() if "error" not in record], failed)
    else:
        (folder / REPORT).unlink(missing_ok=True)  # of an earlier sweep
    print(", ".join(str(path) for path in (folder / "table.md", folder / "table.csv", page) if path))


def _run_all() -> None:
    try:
        _run()
    finally:
        if folders and records and is_first_rank():  # a sweep
            _save_sweep()
    if any("error" in record or any(row["error"] for row in record["metrics"].values()) for record in records.values()):
        sys.exit(1)


def _prepare(arguments: list[str]) -> list[str]:
    """Return the command line with quoted names; refuse launchers, whose processes would not add to the table."""
    if any(argument.startswith("hydra/launcher=") for argument in arguments):
        raise UserError("psp-evaluate runs the jobs of a sweep one after the other; leave out hydra/launcher=.")
    return quote_text(arguments)


def main() -> None:
    """Entry point of `psp-evaluate`."""
    answer("psp-evaluate")
    records.clear()
    folders.clear()
    guard(_run_all, _prepare)


if __name__ == "__main__":
    main()

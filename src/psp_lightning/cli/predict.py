"""psp-predict: write one output for every readable input."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from psp_lightning._conf import config_root
from psp_lightning.cli.align import report, report_unknown, summary
from psp_lightning.cli.help import answer
from psp_lightning.cli.launch import launch
from psp_lightning.cli.mistakes import guard, user_errors
from psp_lightning.cli.ranks import share
from psp_lightning.cli.settings import is_sweep, quote_text
from psp_lightning.utils.devices import check_launched, count_devices, is_first_rank, started_rank
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.build.prediction import PredictionPlan


def predict_job(plan: PredictionPlan, cfg: DictConfig) -> list[dict[str, Any]]:
    """Predict this rank's share of the inputs; return the manifest records of all ranks."""
    from psp_lightning.build.prediction import build_prediction
    from psp_lightning.build.trainer import run_prediction
    from psp_lightning.lit.distributed import gather

    trainer, module, loader, writer = build_prediction(cfg, plan)
    run_prediction(trainer, module, loader)
    return [record for share in gather(writer.records) for record in share]


@hydra.main(version_base="1.3", config_path=config_root(), config_name="predict")
@user_errors
def _run(cfg: DictConfig) -> None:
    from psp_lightning.build.alignment import TABLE
    from psp_lightning.build.photos import PASTED
    from psp_lightning.build.prediction import plan_prediction, sheet_inputs
    from psp_lightning.lit.manifest import MANIFEST, save_manifest
    from psp_lightning.lit.prediction import save_sheet

    wanted = count_devices(cfg.accelerator, cfg.devices)
    check_launched(wanted, None, "devices")
    plan = plan_prediction(cfg, share)
    records = list(plan.skipped)
    if plan.todo:
        if wanted > len(plan.todo) and started_rank() is None:  # more ranks would have no input
            wanted = cfg.devices = len(plan.todo)
        records += launch(partial(predict_job, plan), cfg, wanted)
    if not is_first_rank():
        sys.exit(int(any(record["status"] == "error" for record in records)))
    records.sort(key=lambda record: record["index"])  # ranks and threads return them in any order
    folder = plan.outputs.folder
    save_manifest(folder, records)
    if cfg.sheet:
        save_sheet(folder / "sheet.png", records, sheet_inputs(cfg, plan))
    count = {status: sum(r["status"] == status for r in records) for status in ("ok", "skipped", "error")}
    for record in records:
        if record["status"] == "error":
            print(f"error: {record['error']}", file=sys.stderr)
    again = " (overwrite=true writes them again)" if count["skipped"] else ""
    print(f"{count['ok']} written, {count['skipped']} skipped{again}, {count['error']} failed; {folder / MANIFEST}")
    if codes := plan.write_latents(cfg, records):
        print(f"latents: {codes}")
    pasted = plan.paste(cfg, records)
    if pasted is not None:
        for reason in pasted["failed"]:
            print(f"error: {reason}", file=sys.stderr)
        counted = ", ".join(f"{len(items)} {name}" for name, items in pasted.items())
        print(f"pasted: {counted}; {folder / PASTED}")
        count["error"] += len(pasted["failed"])
    if plan.alignment is not None:
        rows = plan.alignment.rows()
        count["error"] += report(rows) + report_unknown(plan.alignment)
        print(f"photos: {summary(rows)}; {plan.alignment.folder / TABLE}")
    if count["error"]:
        sys.exit(1)


def _command_line(arguments: list[str]) -> list[str]:
    if is_sweep(arguments):
        raise UserError("psp-predict does not sweep (-m). For several inputs, set input= to a folder or a glob.")
    return quote_text(arguments)


def main() -> None:
    """Entry point of `psp-predict`."""
    answer("psp-predict")
    guard(_run, _command_line)


if __name__ == "__main__":
    main()

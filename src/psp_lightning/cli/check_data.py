"""psp-doctor data: check the data, the generator and one step of a training, with the settings of psp-train."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from psp_lightning._conf import config_root
from psp_lightning.cli.mistakes import user_errors
from psp_lightning.cli.settings import is_sweep
from psp_lightning.utils.errors import UserError, plural

FINDINGS = "findings.json"


class Report:
    """Prints findings and figures as they arrive, and keeps them for findings.json."""

    def __init__(self) -> None:
        self.findings: list[Any] = []
        self.figures: dict[str, Any] = {}

    @property
    def faults(self) -> int:
        return sum(item.fault for item in self.findings)

    def add(self, findings: list[Any]) -> None:
        for finding in findings:
            print(finding.line(), flush=True)
        self.findings += findings

    def say(self, name: str, text: str, **figures: Any) -> None:
        print(f"{name:<11} {text}", flush=True)
        self.figures |= figures

    def save(self, folder: Path) -> None:
        from psp_lightning.utils.atomic import replacing

        content = {"findings": [asdict(item) for item in self.findings], **self.figures}
        with replacing(folder / FINDINGS) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8", errors="surrogateescape")


def check(cfg: DictConfig) -> bool:
    """Run all checks of a configuration, print and write what they find, and return whether there is no fault."""
    from psp_lightning.build import doctor
    from psp_lightning.build.trainer import prepare
    from psp_lightning.build.training import build_data
    from psp_lightning.utils.images import save_atomic

    options, folder, report = cfg.doctor, Path(cfg.doctor.output), Report()
    prepare(cfg)
    doctor.check_options(cfg)
    data = build_data(cfg)
    files = doctor.read_files(data, options.workers, options.progress_bar)
    report.add(files.findings)
    if options.faces and doctor.uses_id(cfg):
        try:
            report.add(doctor.look_for_faces(cfg, files))
        except UserError as error:
            report.say("faces", f"not checked: {error}")
    parts = [sum(item.part == part for item in files.pictures) for part in ("train", "val")]
    report.say("files", f"{parts[0]} for training, {parts[1]} for validation", files=parts)
    label_map = doctor.classes(data)
    if label_map is not None and (lines := doctor.histogram(files.facts, label_map)):
        report.say("classes", "id, name, share of the pixels, label maps with the class")
        print("\n".join(lines))
    if not files.usable:
        report.say("networks", "not checked until the files above are fixed")
    else:
        if options.images:
            samples = doctor.first_samples(data, options.images)
            if samples:
                save_atomic(doctor.pairs_sheet(samples, data), folder / "pairs.png")
                report.say("first pairs", f"after all transforms: {folder / 'pairs.png'}")
            _generator(cfg, report, samples, folder)
        if options.trial:
            _trial(cfg, report, data)
    report.save(folder)
    warnings = len(report.findings) - report.faults
    print(f"{plural(report.faults, 'fault')}, {plural(warnings, 'warning')}; {folder / FINDINGS}")
    return not report.faults


def _generator(cfg: DictConfig, report: Report, samples: list[Any], folder: Path) -> None:
    """Check whether the generator fits, and draw its best images for the samples, if there are any."""
    import torch

    from psp_lightning.build import doctor, generator_check
    from psp_lightning.utils.images import save_atomic

    try:
        generator, average = generator_check.load(cfg)
        report.add(generator_check.check_average(generator, average))
        if not samples:
            report.say("generator", "draws the training samples itself")
            return
        images = torch.stack([sample["target"] for sample in samples])
        start = generator.latent_average(n=cfg.model.latent_avg_samples) if average is None else average
        floor = generator_check.measure_floor(
            generator, start, images, cfg.doctor.steps, 60 * cfg.doctor.minutes, cfg.doctor.progress_bar
        )
    except generator_check.TooSlow as error:
        report.say("generator", f"not drawn: this takes about {error}. Set doctor.minutes, or lower doctor.steps")
        return
    except UserError as error:
        report.add([generator_check.unusable(error)])
        return
    report.add(generator_check.check_floor(floor))
    rows = [[image, drawn] for image, drawn in zip(images, floor.drawn, strict=True)]
    captions = [f"{psnr:.1f} dB" for psnr in floor.psnr]
    save_atomic(doctor.sheet(("target", "generator"), rows, captions), folder / "generator.png")
    psnr, detail = floor.mean
    text = f"at best {psnr:.1f} dB PSNR and {max(0.0, detail):.0%} of the detail: {folder / 'generator.png'}"
    report.say("generator", text, psnr_floor=floor.psnr, detail_floor=floor.detail)


def _trial(cfg: DictConfig, report: Report, data: Any) -> None:
    """Make a few steps, and report what they take."""
    from psp_lightning.build.generator_check import unusable
    from psp_lightning.build.trial import try_steps
    from psp_lightning.lit.callbacks.forecast import duration

    try:
        trial = try_steps(cfg, data)
    except UserError as error:
        if not any(str(error) in item.text for item in report.findings):
            report.add([unusable(error)])
        return
    steps = cfg.trainer.max_steps
    if trial.memory is not None:
        what = "on the GPU" if trial.device.startswith("cuda") else "of the process"
        text = f"{trial.memory / 1024:.2f} GB {what} at data.batch_size={cfg.data.batch_size}"
        report.say("memory", text, memory_mb=trial.memory)
    total = duration(steps * trial.seconds)
    text = f"{trial.seconds:.3g} s for a step on {trial.device}, about {total} for {steps} steps without validation"
    report.say("time", text, seconds_per_step=trial.seconds, steps=steps)


healthy: list[bool] = []  # whether the checked data is without fault


@hydra.main(version_base="1.3", config_path=config_root(), config_name="doctor")
@user_errors
def _run(cfg: DictConfig) -> None:
    healthy.append(check(cfg))


def run() -> None:
    """Check the data of the composed configuration; exit with status 1 if there is a fault."""
    if is_sweep(sys.argv):
        raise UserError("psp-doctor checks one training; leave out -m.")
    healthy.clear()
    _run()
    if healthy == [False]:
        sys.exit(1)

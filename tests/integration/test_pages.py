"""The pages about commands, batches, metrics, loggers and released weights: their blocks run in order."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.pages import DOCS, ROOT, blocks, commands, run_block, run_page, write_file
from tests.integration.test_docs import checkpoint


def test_metrics_and_loggers_page(psp, tiny: list[str], place: Path, own_modules) -> None:
    run_page("metrics_and_loggers.md", psp, tiny, place)
    text = (DOCS / "metrics_and_loggers.md").read_text()
    assert (place / "runs/inversion/by_psnr/checkpoints/best.ckpt").is_file()
    columns = (place / "runs/inversion/mae/csv/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/loss", "train/lr", "train/loss_l2", "val/loss", "val/loss_l2", "val/mae"} <= set(columns)
    for name in re.findall(r"`((?:train|val)/[a-z_]+)`", text):
        assert name in columns, f"the page names {name}"
    rows = [json.loads(line) for line in (place / "runs/inversion/jsonl/metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "val/loss"} <= {key for row in rows for key in row} and all("step" in row for row in rows)
    assert (place / "runs/inversion/jsonl/csv/metrics.csv").is_file()
    columns = (place / "runs/inversion/ssim/csv/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/ssim", "val/uqi"} <= set(columns)


def test_evaluation_page(psp, tiny: list[str], place: Path) -> None:  # noqa: F811
    run_page("evaluation.md", psp, tiny, place)
    assert "toyfaces/sketch2face" not in (place / "superres" / "table.md").read_text()
    assert "| toyfaces/superres | 10 |" in (place / "superres" / "table.md").read_text()


def test_runs_page(psp, tiny: list[str], place: Path) -> None:
    pytest.importorskip("matplotlib")
    run_page("runs.md", psp, tiny, place)
    assert (place / "comparison.html").is_file()
    text = (DOCS / "runs.md").read_text()
    run = place / "runs" / "inversion" / "fast"
    for name in re.findall(r"`([\w./]+\.(?:ckpt|csv|png|yaml|log))`", text.split("## List")[0]):
        assert (run / name).is_file(), f"the page names {name}"
    header = psp("runs").out.splitlines()[0]
    assert header.split() == text.split("```text\n")[1].splitlines()[0].split()


@pytest.mark.slow
def test_sweeps_page(psp, tiny: list[str], place: Path) -> None:
    for module in ("optuna", "hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"):
        pytest.importorskip(module)
    run_page("sweeps.md", psp, tiny, place)
    runs = {path.parents[1].relative_to(place / "runs").as_posix() for path in (place / "runs").rglob("last.ckpt")}
    assert {"seeds/0", "seeds/1", "seeds_local/0", "seeds_local/1", "search/0", "search/1", "search/2"} <= runs
    rows = (place / "runs/search/sweep.csv").read_text().splitlines()
    assert len(rows) == 4 and all(",complete," in row for row in rows[1:])


def test_sweeps_page_names_every_state_and_launcher() -> None:
    from psp_lightning.cli.search import STATES

    text = (DOCS / "sweeps.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", text.split("## Searches")[1], re.MULTILINE)
    assert set(named) == {*STATES.values()} - {"waiting"}
    for file in (ROOT / "conf" / "hydra").glob("*/*.yaml"):
        if file.parent.name == "launcher":
            assert f"| `hydra/launcher={file.stem}` |" in text
    for file in (ROOT / "conf" / "hydra" / "sweeper").glob("*/*.yaml"):
        assert file.stem == "tpe" or f"hydra/sweeper/{file.parent.name}={file.stem}" in text


def test_refiner_page(psp, tiny: list[str], place: Path) -> None:
    from psp_lightning import PSP

    names = run_page("refiner.md", psp, tiny, place)
    assert names["inversion"].features.shape[-1] == 32  # type: ignore[attr-defined]
    trained = PSP.from_checkpoint(place / "runs/inversion/refined").refiner
    assert trained is not None and trained.resolution == 16
    assert len(list((place / "out").glob("*.png"))) == 4


def test_e4e_and_restyle_page(psp, tiny: list[str], place: Path) -> None:
    names = run_page("e4e_and_restyle.md", psp, tiny, place)
    assert names["encoder"].differences == 9 and names["module"].critic.steps == 12  # type: ignore[attr-defined]
    columns = (place / "runs/inversion/e4e/csv/metrics.csv").read_text().splitlines()[0].split(",")
    told = re.findall(r"`(train/[a-z_0-9]+)`", (DOCS / "e4e_and_restyle.md").read_text())
    assert told and set(told) <= set(columns)


def test_evaluation_page_names_every_metric() -> None:
    from psp_lightning.metrics import METRICS

    section = (DOCS / "evaluation.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert set(named) == set(METRICS) and len(named) == len(METRICS)


def test_batches_and_losses_page(psp, tiny: list[str], place: Path, own_modules) -> None:
    from dataclasses import fields

    from psp_lightning.losses import LossInputs

    names = run_page("batches_and_losses.md", psp, tiny, place)
    text = (DOCS / "batches_and_losses.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text.split("## LossInputs")[1].split("\n## ")[0], re.MULTILINE)
    assert rows == [field.name for field in fields(LossInputs)]
    batch = names["batch"]
    assert isinstance(batch, dict)
    shown = re.findall(r"^\| `(\w+)` \|", text.split("## Batches of psp-train\n")[1].split("| Task")[0], re.MULTILINE)
    assert shown == list(batch)
    assert set(names["values"]) == {"l2", "w_norm"}  # type: ignore[call-overload]
    columns = (place / "runs/inversion/more/csv/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/charbonnier_largest", "val/charbonnier_largest", "val/loss_charbonnier"} <= set(columns)


def test_the_page_about_batches_has_the_channels_that_the_tasks_have() -> None:
    from psp_lightning.data.datamodules import DATAMODULES
    from psp_lightning.data.stores import ToyFacesStore

    section = (DOCS / "batches_and_losses.md").read_text().split("| Task")[1].split("```")[0]
    told = {
        task: channels
        for tasks, channels in re.findall(r"^\| (`.+`) \| ([\w ]+) \|", section, re.MULTILINE)
        for task in re.findall(r"`(\w+)`", tasks)
    }
    assert set(told) == set(DATAMODULES)
    for task, channels in told.items():
        data = DATAMODULES[task](ToyFacesStore(n=2), ToyFacesStore(n=2))
        if channels.isdigit():
            assert data.in_channels == int(channels), task


def test_commands_page(psp, tiny: list[str], place: Path) -> None:
    printed = []
    for block in blocks(DOCS / "commands.md"):
        for name, *arguments in commands(block) if block.language == "bash" and not block.skipped else ():
            done = psp(name.removeprefix("psp-"), *arguments)
            assert done.code == 0, f"line {block.line}: {shlex.join(arguments)}\n{done.err}"
            printed.append(done.out)
    assert any("3 skipped" in out for out in printed) and "3 written, 0 skipped" in printed[-1]


def test_commands_page_names_every_command() -> None:
    text = (DOCS / "commands.md").read_text()
    project = (DOCS.parent / "pyproject.toml").read_text()
    scripts = re.findall(r"^(psp-[\w-]+) = ", project, re.MULTILINE)
    assert set(re.findall(r"^\| `(psp-[\w-]+)` \|", text.split("## ")[0], re.MULTILINE)) == set(scripts) and scripts
    times = (DOCS / "times.md").read_text()
    assert not (lacking := [name for name in scripts if f"`{name}" not in times]), lacking


def test_completion(monkeypatch: pytest.MonkeyPatch, psp) -> None:
    """What docs/commands.md promises about completion."""
    assert "hydra_bash_completion" in psp("train", "-sc", "install=bash").out
    monkeypatch.setenv("COMP_LINE", "psp-train task=")
    assert "task=sketch2face" in psp("train", "-sc", "query=bash").out.split()
    monkeypatch.setenv("COMP_LINE", "psp-train trainer.")
    assert "trainer.max_steps=" in psp("train", "-sc", "query=bash").out


def test_own_data_page(psp, tiny: list[str], place: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    texts, outputs = [], []
    for block in blocks(DOCS / "own_data.md"):
        if block.skipped:
            continue
        if block.language == "python":
            exec(compile(block.text, f"own_data.md:{block.line}", "exec"), names)
        elif block.language == "text":
            texts.append(block.text)
        elif "exit status 1" in block.text:
            ((_, *arguments),) = commands(block)
            done = psp("doctor", *arguments, "doctor.faces=0", "doctor.progress_bar=false")
            assert done.code == 1, done.out + done.err
            outputs.append(done.out)
        else:
            run_block(block, psp, tiny)
    assert len(texts) == 2 and texts[1].splitlines() == outputs[0].splitlines()[: len(texts[1].splitlines())]
    assert (place / "doctor" / "pairs.png").is_file() and (place / "doctor" / "generator.png").is_file()
    assert len(list((place / "drawn").glob("*.png"))) == 65  # with the sheet


def test_own_data_page_names_every_check() -> None:
    from psp_lightning.data.checks import CHECKS

    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "own_data.md").read_text(), re.MULTILINE)
    assert named == [*CHECKS, "training"]


def test_released_weights_page(psp, tiny: list[str], place: Path) -> None:
    (place / "weights").mkdir()
    checkpoint(place / "weights" / "psp_ffhq_encode.pt")
    run_page("released_weights.md", psp, tiny, place)
    assert Image.open(place / "aligned.png").size == (256, 256)
    assert (place / "inverted" / "aligned.png").is_file()
    from psp_lightning.zoo.locate import RECORDS

    text = (DOCS / "released_weights.md").read_text()
    for name in RECORDS:
        if name.startswith(("psp_", "e4e_")):
            assert f"`{name}`" in text, name


def test_plugins_are_needed_where_the_page_says(psp, tiny: list[str], place: Path, own_modules) -> None:
    """A `_target_` imports a module; a checkpoint does not."""
    from psp_lightning.models.registry import ENCODERS

    for block in blocks(DOCS / "extending.md"):
        if block.file in ("my_encoder.py", "my_conf/encoder/tiny.yaml"):
            write_file(block, place)
    done = psp("train", "--config-dir=my_conf", "encoder=tiny", "run=tiny", *tiny)
    assert done.code == 0, done.err
    again = psp("train", "--config-dir=my_conf", "encoder=tiny", "init_from=runs/inversion/tiny", "run=b", *tiny)
    assert again.code == 0, again.err
    ENCODERS.pop("TinyEncoder")
    sys.modules.pop("my_encoder")
    options = ["ckpt=runs/inversion/tiny", "input=photos", "output=out", "accelerator=cpu", "num_workers=0"]
    refused = psp("predict", *options)
    assert refused.code == 1 and "TinyEncoder" in refused.err
    done = psp("predict", *options, "plugins=[my_encoder]", "latents=true")
    assert done.code == 0, done.err

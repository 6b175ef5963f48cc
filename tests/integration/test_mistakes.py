"""Mistakes of impatient users, each of which once lost work or ended in a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def last(tmp_path: Path, run: str = "r", task: str = "inversion") -> dict:
    return torch.load(tmp_path / "runs" / task / run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("n", [6, 8])
def test_accumulation_leaves_a_checkpoint(n: int, psp, tiny: list[str], tmp_path: Path) -> None:
    """6 samples in batches of 2 are 3 batches; Lightning makes a step with only the last one."""
    tiny = [item for item in tiny if not item.startswith("data.train.n")]
    settings = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=3", f"data.train.n={n}", "run=r"]
    done = psp("train", *tiny, *settings, "trainer.log_every_n_steps=1")
    assert done.code == 0, done.err
    assert last(tmp_path)["global_step"] == 3
    done = psp("train", "resume=auto", "run=r", "trainer.max_steps=5")
    assert done.code == 0, done.err
    assert last(tmp_path)["global_step"] == 5
    rows = (tmp_path / "runs" / "inversion" / "r" / "csv" / "metrics.csv").read_text().splitlines()
    steps = [row.split(",")[0] for row in rows[1:] if row.split(",")[2]]
    assert steps == ["1", "2", "3", "4", "5"]


def test_a_rejected_resume_does_not_change_the_run(psp, tiny: list[str], tmp_path: Path) -> None:
    assert psp("train", *tiny, "run=r").code == 0
    for change in ("optimizer.lr=0.5", "optimizer=adam", "encoder.width=8", "task=superres", "data.batch_size=3"):
        done = psp("train", "resume=runs/inversion/r", "trainer.max_steps=4", change)
        assert done.code == 1 and "Traceback" not in done.err, f"{change}: {done.err}"
        assert change.partition("=")[0].split(".")[-1].split("_")[0] in done.err, done.err
    recorded = tmp_path / "runs" / "inversion" / "r" / "arithmetic.yaml"
    recorded.write_text(re.sub(r"threads: \d+", "threads: 77", before := recorded.read_text()))
    done = psp("train", "resume=runs/inversion/r", "trainer.max_steps=4")
    assert done.code == 0, done.err
    assert last(tmp_path)["global_step"] == 4
    assert "changed on resume: trainer.max_steps: 2 -> 4" in done.out
    assert re.search(r"changed on resume: threads: 77 -> \d+\n", done.out) and recorded.read_text() == before


def test_a_finished_run_is_not_overwritten(psp, tiny: list[str], tmp_path: Path) -> None:
    assert psp("train", *tiny, "run=r").code == 0
    before = (tmp_path / "runs" / "inversion" / "r" / "csv" / "metrics.csv").read_text()
    done = psp("train", *tiny, "run=r", "seed=3")
    assert done.code == 1 and "contains a run already" in done.err and "resume=" in done.err
    assert (tmp_path / "runs" / "inversion" / "r" / "csv" / "metrics.csv").read_text() == before
    done = psp("train", "resume=runs/inversion/r")
    assert done.code == 0 and "already at step 2" in done.out


def test_config_dir_with_a_space_survives_a_resume(psp, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: 0.002\n")
    assert psp("train", "--config-dir", "own", "experiment=mine", *tiny, "run=r").code == 0
    done = psp("train", "--config-dir", "own", "resume=runs/inversion/r", "trainer.max_steps=3")
    assert done.code == 0, done.err
    assert last(tmp_path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.002


@pytest.mark.parametrize("encoder", ["w", "w_plus"])
def test_encoders_into_w(encoder: str, psp, tiny: list[str], tmp_path: Path) -> None:
    small = [f"encoder={encoder}", "encoder.blocks=[1,1,1,1]", "encoder.width=8", "loss=[l2,w_norm]"]
    done = psp("train", *tiny, *small, "run=r")
    assert done.code == 0, done.err
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    done = psp("predict", "ckpt=runs/inversion/r", "input=x.png", "output=out", "num_workers=0", "progress_bar=false")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=toyfaces_inversio"], "Did you mean 'toyfaces_inversion'?"),
        (["debug=fastt"], "Did you mean 'fast'?"),
        (["logger=null"], "Choose from: csv, none"),
        (["trainer.accelerator=banana"], "banana"),
        (["trainer.devices=0"], "devices=0"),
        (["loss=[l2]", "loss.l2.weight=0"], "weight 0"),
        (["loss.l2.weight=-1"], "loss.l2.weight"),
        (["loss=[]"], "No loss is selected"),
        (["callbacks.best.monitor=val/nope"], "callbacks.best.monitor"),
        (["callbacks.best.mode=avg"], "callbacks.best.mode"),
        (["objective=val/los"], "Did you mean 'val/loss'?"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["optimizer.eps=-1"], "optimizer: Invalid epsilon"),
        (["+encoder.widht=3"], "encoder.widht. Did you mean 'width'?"),
        (["data.limit=0"], "data.limit=0 must be a whole number, at least 1"),
        (["data.val_batch_size=0"], "data.val_batch_size=0"),
        (["model.warmup_steps=-1"], "model.warmup_steps=-1"),
        (["callbacks.last.every_n_steps=0"], "callbacks.last.every_n_steps=0"),
        (["+metric.foo.x=1"], "metric=[...,foo]"),
        (["metric=mse,psnr"], "metric=[mse,psnr]"),
        (["seed=abc"], "seed"),
        (["trainer.max_steps=0"], "trainer.max_steps"),
        (["trainer.precision=foo"], "foo"),
        (["callbacks.images.n_images=0"], "n_images"),
        (["resume=x", "-m"], "leave out -m"),
        (["oops"], "KEY=VALUE"),
        (["data.flip=2"], "data.flip=2"),
        (["task=superres", "task.datamodule.factors=[x]"], "task.datamodule.factors"),
    ],
)
def test_invalid_settings(arguments: list[str], message: str, psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", *tiny, *arguments)
    assert done.code == 1 and message in done.err, done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["loss=[mine]", "loss.mine.weihgt=2"],
            "no configuration key 'loss.mine.weihgt'. Did you mean 'loss.mine.weight'",
        ),
        (["loss=[l2]", "loss.mine.weight=2"], "'mine' is not selected: add it to the list, loss=[...,mine]"),
        (["loss=[l2]", "loss.min.weight=2"], "there is no loss 'min'. Did you mean 'mine'"),
        (["loss=[l2]", "loss.l2.weihgt=2"], "'loss.l2.weihgt'. Did you mean 'loss.l2.weight'"),
    ],
)
def test_settings_of_options_in_a_list(settings: list[str], message: str, psp, tmp_path: Path) -> None:
    (tmp_path / "own" / "loss").mkdir(parents=True)
    (tmp_path / "own" / "loss" / "mine.yaml").write_text("# @package loss\nmine:\n  weight: 1.0\n")
    done = psp("train", "--config-dir", "own", *settings)
    assert done.code == 1 and message in done.err, done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("trainer", ["gpu", "ddp", "mps"])
def test_a_missing_device(trainer: str, psp, tiny: list[str]) -> None:
    done = psp("train", *[item for item in tiny if item != "trainer=cpu"], f"trainer={trainer}")
    assert done.code == 1 and "trainer=cpu" in done.err and "Traceback" not in done.err, done.err


def test_all_devices_of_a_cpu_mean_one(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", *tiny, "trainer.devices=-1", "run=r")
    assert done.code == 0, done.err


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_validation_file_is_named_with_any_workers(workers: int, psp, tiny: list[str], tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.png")
        Image.new("RGB", (64, 64)).save(tmp_path / name / "b.png")
    (tmp_path / "val" / "b.png").write_bytes(b"no picture")
    tiny = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    data = ["data=folder", "data.root=train", "data.val_root=val", f"data.num_workers={workers}"]
    done = psp("train", *tiny, *data)
    assert done.code == 1 and "b.png" in done.err and "Traceback" not in done.err, done.err


def test_unpaired_files_are_named_and_can_be_skipped(psp, tiny: list[str], tmp_path: Path) -> None:
    for folder, names in (("s", "abx"), ("t", "aby")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("L" if folder == "s" else "RGB", (64, 64)).save(tmp_path / folder / f"{name}.png")
    tiny = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    data = ["task=sketch2face", "data=folder", "data.source=s", "data.target=t", "data.num_workers=0"]
    done = psp("train", *tiny, *data)
    assert done.code == 1 and "x" in done.err and "data.unpaired=skip" in done.err
    done = psp("train", *tiny, *data, "data.unpaired=skip", "run=r")
    assert done.code == 0, done.err


def test_label_outside_the_map_is_named(psp, tiny: list[str], tmp_path: Path) -> None:
    for folder, mode in (("s", "L"), ("t", "RGB")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (64, 64)).save(tmp_path / folder / "a.png")
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(tmp_path / "s" / "a.png")
    tiny = [item for item in tiny if not item.startswith(("data.val.n", "data.train.n"))]
    data = ["task=seg2face", "data=folder", "data.source=s", "data.target=t", "data.num_workers=0"]
    done = psp("train", *tiny, *data)
    assert done.code == 1 and "a.png" in done.err and "77" in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("name", ["k=v.png", "日本.png", "q'uo\"te.png", "a b.png", "-dash.png", "com,ma.png"])
def test_unusual_file_names(name: str, psp, golden, tmp_path: Path) -> None:
    from psp_lightning.models.encoders import EncoderIntoW
    from psp_lightning.models.psp import PSP
    from psp_lightning.models.stylegan2 import Generator

    generator = Generator.seeded(0, output_size=16, style_dim=8, n_mapping=1, max_channels=8)
    net = PSP(
        EncoderIntoW(8, input_size=16, blocks=(1, 1, 1, 1), width=4), generator, source={"kind": "rgb", "size": 16}
    )
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"psp": net.describe(), "state_dict": state}, tmp_path / "n.ckpt")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / name)
    quiet = ["num_workers=0", "progress_bar=false"]
    done = psp("predict", "ckpt=n.ckpt", f"input=in/{name}", "output=out", *quiet)
    assert done.code == 0, done.err
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line["source"] == f"in/{name}" and (tmp_path / line["output"][0]).exists()
    done = psp("predict", "ckpt=n.ckpt", "input=in", "output=in", *quiet)
    assert done.code == 1 and "folder of the inputs" in done.err
    for bad in ("resize=0", "batch_size=0", "precision=8", "mix.latent_mask=8", "mix.n_outputs=0", "mask.kind=box"):
        done = psp("predict", "ckpt=n.ckpt", "input=in", "output=new", bad, *quiet)
        assert done.code == 1 and bad.split("=")[0].split(".")[0] in done.err and "Traceback" not in done.err, done.err


@pytest.mark.slow
def test_interrupting_two_ranks_leaves_a_resumable_state(shell, tiny: list[str], tmp_path: Path) -> None:
    settings = [item for item in tiny if item != "trainer=cpu" and "max_steps" not in item]
    command = [
        sys.executable,
        "-m",
        "psp_lightning.cli.train",
        "trainer=ddp_cpu",
        *settings,
        "trainer.max_steps=100000",
    ]
    process = subprocess.Popen(
        [*command, "run=r", "trainer.val_every=1000"], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "runs" / "inversion" / "r"
    deadline = time.time() + 150
    while not (run / "images" / "train_00000002.png").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on ctrl-C
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "resume=" in out and "Traceback" not in out, out
    assert out.count("stopping after this step") == 1, out
    step = last(tmp_path)["global_step"]
    done = shell("train", f"resume={run}", f"trainer.max_steps={step + 1}")
    assert done.code == 0, done.err
    assert last(tmp_path)["global_step"] == step + 1


@pytest.mark.parametrize("name", ["2024_01_05", "it's [1e3], é=1"])
def test_a_run_keeps_the_name_that_was_typed(name: str, psp, tiny: list[str], tmp_path: Path) -> None:
    tiny = [item for item in tiny if not item.startswith(("data.", "trainer.max_steps"))]
    root = tmp_path / "1e3"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(root / f"{i}.png")
    common = [*tiny, "loss=[l2]", "data=folder", "data.num_workers=0", "data.batch_size=2", "data.root=1e3"]
    done = psp("train", *common, f"run={name}", "trainer.max_steps=2")
    assert done.code == 0, done.err
    assert [path.name for path in (tmp_path / "runs" / "inversion").iterdir()] == [name]
    done = psp("train", "resume=auto", f"run={name}", "trainer.max_steps=3")
    assert done.code == 0 and last(tmp_path, name)["global_step"] == 3, done.err
    done = psp("train", f"resume=runs/inversion/{name}", "trainer.max_steps=4")
    assert done.code == 0 and last(tmp_path, name)["global_step"] == 4, done.err
    predict = ["num_workers=0", "progress_bar=false", f"ckpt=runs/inversion/{name}", "input=1e3", "output=2024"]
    done = psp("predict", *predict)
    assert done.code == 0 and (tmp_path / "2024" / "0.png").is_file(), done.err


def test_a_run_says_how_long_it_will_take(psp, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psp_lightning.lit.callbacks.Forecast.steps", 1)
    monkeypatch.setattr("psp_lightning.lit.callbacks.forecast.LONG", 0)
    done = psp("train", *tiny, "loss=[l2]", "trainer.max_steps=4", "run=r")
    assert done.code == 0 and re.search(r"step 2 of 4: about \d+ s to go, at \S+ s per step\n", done.out), done.err
    assert done.out.count(" to go, at") == 1 and "uses a CPU" in done.out and "encoder=gradual_small" in done.out


def test_a_file_that_is_not_yaml(psp, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "loss").mkdir(parents=True)
    (tmp_path / "own" / "loss" / "mine.yaml").write_text("mine:\n _target_: my.Mine\n  weight: 1.0\n")
    done = psp("train", "--config-dir", "own", *tiny, "loss=[mine]")
    assert done.code == 1 and done.err.startswith("error: "), done.err
    assert "mine.yaml, line 3, column 9: this is not YAML: mapping values are not allowed here." in done.err, done.err


def test_a_module_with_plugins_needs_no_brackets(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", *tiny, "plugins=no_such_module")
    assert done.code == 1 and "there is no module 'no_such_module'" in done.err, done.err


def test_the_closest_key_is_not_a_part_of_the_key_itself(psp, tiny: list[str]) -> None:
    done = psp("train", *tiny, "encoder.e=3")
    assert done.code == 1 and "no configuration key 'encoder.e'" in done.err, done.err
    assert "Did you mean 'encoder'" not in done.err, done.err


def test_a_task_without_a_name(psp, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "task").mkdir(parents=True)
    (tmp_path / "own" / "task" / "mine.yaml").write_text("datamodule:\n  _target_: my.Mine\n  _partial_: true\n")
    done = psp("train", "--config-dir", "own", *tiny, "task=mine")
    assert done.code == 1 and "refers to task.name, which is not set: a file of yours lacks it" in done.err, done.err

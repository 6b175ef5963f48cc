"""Several ranks on one machine: gradients, sweeps, and no orphaned ranks."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.serial]

SGD = """
_target_: torch.optim.SGD
_partial_: true
lr: 1.0
"""


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = ("net.encoder.", "net.refiner.")
    return {key: value for key, value in state.items() if key.startswith(trained) and value.is_floating_point()}


E4E = ["encoder=e4e_small", "editability=e4e", "editability.start=0", "editability.pool=2"]  # most heads are unused
# In float64, because the second pass and the networks of the losses amplify float32 rounding. Measured changes of the
# gradients, relative to the largest element: 3e-6 with one pass, 6e-4 with two, 4e-5 with two and only l2; 1e-13 in
# float64 with two and only l2.
RESTYLE = ["encoder=restyle_small", "encoder.iterations=2", "model.loss_per_pass=true", "loss=[l2]"]
RESTYLE += ["trainer.precision=64-true"]
REFINER = ["refiner=features", "refiner.width=16", "refiner.blocks=1", "refiner.edit_share=0"]
REFINER += ["refiner.train_encoder=true", "encoder=gradual_small", "init_from=toyfaces/inversion"]


@pytest.mark.parametrize("kind", [[], E4E, RESTYLE, REFINER], ids=["psp", "e4e", "restyle", "refiner"])
def test_two_ranks_give_the_gradients_of_one(shell, tiny: list[str], tmp_path: Path, kind: list[str]) -> None:
    """A step of plain SGD with lr 1 changes the weights by exactly the gradient."""
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "sgd.yaml").write_text(SGD)
    base = ["--config-dir", "own", "optimizer=sgd", "model.batch_norm=frozen", "model.noise=const", *tiny, *kind]
    # not seed 0: there float64 agrees to 1e-13, but float32 rounding changes the gradient of the batch of four by 2e-3
    base += ["trainer.max_steps=1", "trainer.val_every=1", "seed=1"]
    runs = {"one": ["data.batch_size=4"], "two": ["trainer=ddp_cpu", "data.batch_size=2"], "start": ["optimizer.lr=0"]}
    for name, settings in runs.items():
        settings = [item for item in base if not (name == "two" and item == "trainer=cpu")] + settings
        done = shell("train", *settings, f"run={name}")
        assert done.code == 0, done.err
    start, one, two = (trained_weights(tmp_path / "runs" / "inversion" / name) for name in ("start", "one", "two"))
    moved = 0
    for key in start:
        a, b = one[key] - start[key], two[key] - start[key]
        scale = a.abs().max().item()
        moved += scale > 0
        # the difference of two weights also contains their rounding error
        bound = 1e-10 * scale if kind == RESTYLE else 1e-4 * scale + 4e-7 * start[key].abs().max().item()
        assert (a - b).abs().max().item() <= bound, f"{key}: {(a - b).abs().max().item():.2e} of {scale:.2e}"
    assert moved > 20, "the step changed too few parameters"
    if kind == REFINER:
        assert not torch.equal(one["net.refiner.change.weight"], start["net.refiner.change.weight"])
    if kind == E4E:
        files = [tmp_path / "runs" / "inversion" / name / "checkpoints" / "last.ckpt" for name in ("one", "two")]
        a, b = (torch.load(file, weights_only=True)["e4e"] for file in files)
        for pool in ("real_pool", "fake_pool"):
            assert len(a[pool]) == 2 and (a[pool] - b[pool]).abs().max() <= 1e-4 * a[pool].abs().max()
        for key, state in a["optimizer"]["state"].items():
            other = b["optimizer"]["state"][key]["exp_avg"]
            assert (state["exp_avg"] - other).abs().max() <= 1e-3 * other.abs().max(), "the discriminator's gradient"


def test_objective_reaches_the_sweeper(shell, tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = shell(
        "train", "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1",
        "hydra.sweep.dir=sweep", "trainer=ddp_cpu", *settings, timeout=400,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    losses = {}
    for job in ("0", "1"):
        rows = (tmp_path / "sweep" / job / "csv" / "metrics.csv").read_text().splitlines()
        row = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        losses[yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())["optimizer"]["lr"]] = row[
            "val/loss"
        ]
    best = min(losses, key=lambda lr: float(losses[lr]))
    assert result["best_params"]["optimizer.lr"] == pytest.approx(best)
    assert result["best_value"] == pytest.approx(float(losses[best]), rel=1e-5)


def test_a_search_with_two_ranks_ends_in_one_table(shell, tiny: list[str], tmp_path: Path) -> None:
    """Seed 37 chooses the rates 0.001, 1e30, 0.1 and 0.1: one trial ends, one fails, two are worse and pruned."""
    pytest.importorskip("optuna")
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = shell(
        "train", "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=sweep", "trainer=ddp_cpu",
        "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=37", "optimizer.lr=choice(0.001,0.1,1e30)",
        "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1", *settings, "loss=[l2]",
        "trainer.max_steps=4", "trainer.val_every=1", timeout=900,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["trial"], row["state"], row["run"]) for row in rows] == [
        ("0", "complete", "sweep/0"), ("1", "failed", "sweep/1"), ("2", "pruned", "sweep/2"), ("3", "pruned", "sweep/3")
    ]  # fmt: skip
    assert "loss term 'l2'" in rows[1]["error"] and rows[0]["error"] == ""
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert table.count("\n") == 6 and table in done.out
    done_steps = {
        trial: torch.load(tmp_path / "sweep" / trial / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        for trial in ("0", "2", "3")
    }
    assert done_steps["0"] == 4 and max(done_steps["2"], done_steps["3"]) < 4, done_steps


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killing_the_parent_ends_all_ranks(tiny: list[str], tmp_path: Path) -> None:
    settings = [item for item in tiny if item != "trainer=cpu" and "steps" not in item and "val_every" not in item]
    command = [
        sys.executable, "-m", "psp_lightning.cli.train", "trainer=ddp_cpu", *settings, "trainer.max_steps=100000",
        "callbacks.images.every_n_steps=2", "run=r",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 150
    while not (tmp_path / "runs" / "inversion" / "r" / "images" / "train_00000002.png").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    ranks = descendants(process.pid)
    assert len(ranks) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.time() + 20
    while (
        alive := [pid for pid in ranks if Path(f"/proc/{pid}").exists() and not _zombie(pid)]
    ) and time.time() < deadline:
        time.sleep(0.2)
    assert not alive, f"ranks {alive} outlived their parent"


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_sweep_with_two_ranks_has_one_directory_per_job_and_survives_an_error(
    shell, tiny: list[str], tmp_path: Path
) -> None:
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = shell("train", "-m", "optimizer.lr=1e30,1e-4", "task=superres", "trainer=ddp_cpu", "trainer.devices=2",
                 *settings, "trainer.max_steps=8", "trainer.val_every=8", timeout=400)  # fmt: skip
    assert done.code == 1
    assert "loss term 'l2'" in done.err and "Traceback" not in done.err.split("error: ")[-1], done.err
    assert "Terminating process" not in done.err, "torch reports the same failure"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["multirun"]
    (sweep,) = (tmp_path / "runs" / "multirun").iterdir()
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [job.name for job in jobs] == ["0", "1"]
    for job, lr in zip(jobs, (1e30, 1e-4), strict=True):
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert (config["optimizer"]["lr"], config["task"]["name"]) == (lr, "superres")
    good = jobs[1]
    assert torch.load(good / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    log = (good / "train.log").read_text()
    assert log.count("done: step 8") == 1, log
    assert len((good / "csv" / "metrics.csv").read_text().splitlines()) == 3  # names, training, validation

"""Folders of runs and sweeps: who may write to them."""

from __future__ import annotations

import csv
import datetime
import importlib
from pathlib import Path

import hydra.core.utils
import pytest
import yaml
from PIL import Image

import psp_lightning
from psp_lightning.lit.run_folder import claim_run, claimed, is_claimed
from psp_lightning.utils.errors import UserError

TINY = ["trainer=cpu", "loss=[l2]", "data.train.n=4", "data.val.n=2", "data.batch_size=2", "trainer.max_steps=1",
        "trainer.val_every=1", "trainer.enable_progress_bar=false", "model.latent_avg_samples=16"]  # fmt: skip
GENERATOR = ["trainer=cpu", "domain=toyfaces", "data.images.n=4", "data.batch_size=2", "domain.size=32",
             "network.max_channels=8", "trainer.max_steps=1", "trainer.enable_progress_bar=false",
             "callbacks.images.n_images=4"]  # fmt: skip


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs start in the same second."""

    class Noon(datetime.datetime):
        @classmethod
        def now(cls, tz: object = None) -> Noon:
            return cls(2024, 1, 5, 12, 0, 0)

    monkeypatch.setattr(hydra.core.utils, "datetime", Noon)


def seeds(folder: Path) -> dict[str, int]:
    return {path.parent.name: yaml.safe_load(path.read_text())["seed"] for path in folder.glob("*/config.yaml")}


def test_runs_of_the_same_second_have_folders_of_their_own(noon: None, psp, tmp_path: Path) -> None:
    for seed in (1, 2):
        done = psp("train", *TINY, f"seed={seed}")
        assert done.code == 0, done.err
    runs = tmp_path / "runs" / "inversion"
    assert seeds(runs) == {"2024-01-05_12-00-00": 1, "2024-01-05_12-00-00_2": 2}
    for run in runs.iterdir():
        assert yaml.safe_load((run / "config.yaml").read_text())["run"] == run.name
        assert (run / "train.log").read_text().count("done: step 1") == 1
        assert (run / "checkpoints" / "last.ckpt").is_file()


def test_sweeps_of_the_same_second_have_folders_of_their_own(noon: None, psp, tmp_path: Path) -> None:
    for seed in (1, 2):
        done = psp("train", "-m", *TINY, f"seed={seed}")
        assert done.code == 0, done.err
    sweeps = tmp_path / "runs" / "multirun"
    assert {path.name: seeds(path) for path in sweeps.iterdir()} == {
        "2024-01-05_12-00-00": {"0": 1}, "2024-01-05_12-00-00_2": {"0": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "settings", "family"),
    [("train", TINY, "inversion"), ("train_generator", GENERATOR, "generator")],
    ids=["encoder", "generator"],
)
def test_a_given_name_that_is_taken_is_an_error(
    command: str, settings: list[str], family: str, psp, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / family / "a"
    claim = claim_run(run, False, "")  # of a run that has no last.ckpt yet
    try:
        done = psp(command, *settings, "run=a")
        assert done.code == 1 and "Another process is writing to" in done.err and "run=NAME" in done.err, done.err
        done = psp(command, *settings, f"hydra.run.dir={run}")
        assert done.code == 1 and "Another process is writing to" in done.err
    finally:
        claim.release()
    assert [path.name for path in run.iterdir()] == [".claim"], "something was written before the claim"
    assert psp(command, *settings, "run=a").code == 0  # the process has ended
    log = (run / "train.log").read_bytes()
    done = psp(command, *settings, "run=a")
    assert done.code == 1 and "contains a run already" in done.err and f"resume={run.relative_to(tmp_path)}" in done.err
    assert (run / "train.log").read_bytes() == log
    claim = claim_run(run, True, "")
    try:
        done = psp(command, f"resume={run}", "trainer.max_steps=2")
        assert done.code == 1 and "Another process is writing to" in done.err
    finally:
        claim.release()
    assert psp(command, f"resume={run}", "trainer.max_steps=2").code == 0


def test_a_given_sweep_folder_that_is_taken_is_an_error(psp, tmp_path: Path) -> None:
    claim = claim_run(tmp_path / "sweep", False, "")
    try:
        done = psp("train", "-m", *TINY, "hydra.sweep.dir=sweep")
        assert done.code == 1 and "Another process is writing to sweep" in done.err, done.err
    finally:
        claim.release()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [".claim"]


@pytest.mark.parametrize(
    ("command", "settings"), [("train", TINY), ("train_generator", GENERATOR)], ids=["encoder", "generator"]
)
def test_each_job_of_a_sweep_claims_its_folder(
    command: str, settings: list[str], psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, bool]] = []

    def job(*args: object, **kwargs: object) -> None:
        seen.append({name: is_claimed(tmp_path / "sweep" / name) for name in ("0", "1")})
        if len(seen) == 1:
            raise UserError("this job fails")

    monkeypatch.setattr(importlib.import_module(f"psp_lightning.cli.{command}"), f"{command}_job", job)
    assert psp(command, "-m", *settings, "seed=1,2", "hydra.sweep.dir=sweep").err.count("this job fails") == 1
    assert seen == [{"0": True, "1": False}, {"0": False, "1": True}]
    assert not is_claimed(tmp_path / "sweep" / "1")


def test_a_job_whose_folder_is_taken_fails_and_the_others_run(psp, tmp_path: Path) -> None:
    with claimed(tmp_path / "sweep" / "0", False, ""):
        done = psp("train", "-m", *TINY, "seed=1,2", "hydra.sweep.dir=sweep")
    assert done.code == 1 and "Another process is writing to" in done.err.splitlines()[-1], done.err
    assert seeds(tmp_path / "sweep") == {"1": 2}


def test_a_training_from_python_claims_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"losses": {"l2": 1.0}, "steps": 1, "batch_size": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    claim = claim_run(tmp_path / "run", False, "")
    try:
        with pytest.raises(UserError, match="Another process is writing to run"):
            psp_lightning.fit("inversion", psp_lightning.ToyFaces(n=4), run="run", **options)
    finally:
        claim.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".claim"]


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/../../x", ""])
def test_a_run_stays_below_its_folder(name: str, psp, tmp_path: Path) -> None:
    done = psp("train", *TINY, f"run={name}")
    assert done.code == 1 and f"run={name} is not the name of a folder inside" in done.err, done.err
    assert not (tmp_path / "runs").exists()


def test_a_short_run_leaves_metrics_and_a_picture(psp, tmp_path: Path) -> None:
    done = psp("train", *TINY, "trainer.val_every=5", "trainer.max_steps=2", "run=a")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "inversion" / "a"
    assert [row["step"] for row in csv.DictReader((run / "csv" / "metrics.csv").open())] == ["2"]
    assert Image.open(run / "images" / "train_00000002.png").size[0] > 0


def test_a_short_training_of_a_generator_leaves_metrics(psp, tmp_path: Path) -> None:
    done = psp("train_generator", *GENERATOR, "trainer.max_steps=2", "run=a")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "generator" / "a"
    assert [row["step"] for row in csv.DictReader((run / "csv" / "metrics.csv").open())] == ["2"]
    assert [path.name for path in (run / "images").iterdir()] == ["samples_00000002.png"]


# --- searches

SEARCH = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=sweep", *TINY]


@pytest.mark.parametrize("setting", ["trainer.val_every=2", "trainer.limit_val_batches=0", "objective=null"])
def test_a_search_without_an_objective_does_not_start(setting: str, psp, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    done = psp("train", *SEARCH, setting)
    assert done.code == 1 and "objective=" in done.err.splitlines()[-1], done.err
    assert not list(tmp_path.glob("sweep/*/config.yaml"))


# with the learning rate 1e-4 it trains, with the others it diverges, the first trial in both cases
@pytest.mark.parametrize(("rates", "best"), [("1e-4,1e30", 1e-4), ("1e30,1e29", None)])
def test_a_diverging_trial_does_not_end_the_search(rates: str, best: float | None, psp, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    choice = ["hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0", f"optimizer.lr=choice({rates})"]
    done = psp("train", *SEARCH, *choice, "trainer.max_steps=3", "trainer.val_every=3")
    assert "loss term 'l2'" in done.out + done.err
    if best is None:
        assert done.code == 1 and "no trial of the search was completed" in done.err.split("error: ")[-1], done.err
        return
    assert done.code == 0, done.err
    result = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert result["best_params"]["optimizer.lr"] == pytest.approx(best)

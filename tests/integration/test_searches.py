"""Searches: the study survives what happens to the search, and every trial has a row that says how it ended."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

SEARCH = ["-m", "hparams_search=optuna", "hydra.sweep.dir=sweep", "hydra/sweeper/sampler=random",
          "hydra.sweeper.sampler.seed=0", "trainer=cpu"]  # fmt: skip
# a training that takes no time: its value is the learning rate
KILLED = """
import os, signal
from psp_lightning.cli import train

def job(cfg, trial=None):
    if cfg.paths.output_dir.endswith("/2"):
        os.kill(os.getpid(), signal.SIGKILL)
    return float(cfg.optimizer.lr)

train.train_job = job
train.main()
"""


def instant(cfg: Any, trial: Any = None) -> float:
    return float(cfg.optimizer.lr)


@pytest.fixture
def search(psp, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a search whose trials are calls of `job`."""

    def call(*settings: str, job: Any = instant):
        monkeypatch.setattr("psp_lightning.cli.train.train_job", job)
        return psp("train", *SEARCH, *settings)

    return call


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").open()))


def states(folder: Path) -> list[str]:
    return [row["state"] for row in table(folder)]


def test_a_killed_search_continues(search, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *SEARCH, "hydra.sweeper.n_trials=4"]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert states(tmp_path / "sweep") == ["complete", "complete"], "the table has what was finished"
    done = search("hydra.sweeper.n_trials=4")
    assert done.code == 0, done.err
    rows = table(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete", "complete", "interrupted", "complete", "complete"]
    rates = [row["optimizer.lr"] for row in rows]
    assert rates[3] == rates[2], "the values of the interrupted trial are not tried again"
    assert len(set(rates)) == 4, "the seed repeats the first trials"
    assert "2 trials finished" in done.out
    again = search("hydra.sweeper.n_trials=4")
    assert again.code == 0 and table(tmp_path / "sweep") == rows, "a search that has all its trials runs none"
    assert search("hydra.sweeper.n_trials=6").code == 0
    assert states(tmp_path / "sweep")[5:] == ["complete", "complete"]
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert folders == set("0123456") and table(tmp_path / "sweep")[6]["run"] == "sweep/6"


def test_a_batch_that_is_killed_keeps_its_results(search, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3"]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = search("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3")
    assert done.code == 0, done.err
    rows = table(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete", "complete", "interrupted", "complete"]
    assert [row["val/loss"] for row in rows[:2]] == [row["optimizer.lr"] for row in rows[:2]]
    assert rows[3]["optimizer.lr"] == rows[2]["optimizer.lr"]


def test_ctrl_c_keeps_the_results_of_a_batch(search, tmp_path: Path) -> None:
    def job(cfg: Any, trial: Any = None) -> float:
        from psp_lightning.cli.trial import Pruned

        number = int(Path(cfg.paths.output_dir).name)
        if number == 2:
            raise KeyboardInterrupt
        trial.open().report(float(number), 10)
        return Pruned(number) if number == 1 else float(number)

    done = search("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "hydra/sweeper/pruner=median", job=job)
    assert done.code == 130, done.err
    assert [(row["state"], row["val/loss"]) for row in table(tmp_path / "sweep")] == [
        ("complete", "0.0"), ("pruned", "1.0"), ("interrupted", ""),
    ]  # fmt: skip


def test_interrupted_values_are_tried_once(search, tmp_path: Path) -> None:
    """The killed search had another setting and not yet chosen the batch size."""
    import optuna
    from optuna.distributions import FloatDistribution

    (tmp_path / "sweep").mkdir()
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/sweep/study.db", study_name="psp-train")
    rates = FloatDistribution(0.0001, 0.003, log=True)
    lr = study.ask({"optimizer.lr": rates, "optimizer.rate": FloatDistribution(1, 2)}).params["optimizer.lr"]
    for n in (1, 2):
        assert search(f"hydra.sweeper.n_trials={n}", "data.batch_size=int(interval(2,8))").code == 0
    rows = table(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete"]
    assert [float(row["optimizer.lr"]) == pytest.approx(lr) for row in rows] == [True, True, False]


def test_waiting_values_are_tried_once(search, tmp_path: Path) -> None:
    """The search was killed after it had noted the values that are to be tried again, and before it tried them."""
    import optuna

    (tmp_path / "sweep").mkdir()
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/sweep/study.db", study_name="psp-train")
    lr = study.ask({"optimizer.lr": optuna.distributions.FloatDistribution(0.0001, 0.003, log=True)}).params
    study.enqueue_trial(lr)
    assert search("hydra.sweeper.n_trials=2").code == 0
    rows = table(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["interrupted", "complete", "complete"]
    assert rows[1]["optimizer.lr"] == rows[0]["optimizer.lr"] != rows[2]["optimizer.lr"]


def test_a_table_that_cannot_be_written_hides_no_error(search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf

    def broken(result: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    def job(cfg: Any, trial: Any = None) -> float:
        if cfg.paths.output_dir.endswith("/1"):
            monkeypatch.setattr(OmegaConf, "save", broken)
            raise KeyboardInterrupt
        return 1.0

    assert search("hydra.sweeper.n_trials=2", job=job).code == 130
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == 1.0, "a file that was written partly replaced the earlier one"


def test_a_setting_may_be_null_and_a_number_may_be_written_as_1e1(search, tmp_path: Path) -> None:
    def job(cfg: Any, trial: Any = None) -> float:
        assert cfg.init_from is None
        return 1.0

    done = search(
        "hydra.sweeper.n_trials=2e0", "hydra.sweeper.n_jobs=1.0", "+hydra.sweeper.params.init_from=null", job=job
    )
    assert done.code == 0, done.err
    assert states(tmp_path / "sweep") == ["complete", "complete"]


def test_a_search_needs_the_option_m_and_a_trial_can_be_resumed(psp, tiny: list[str], tmp_path: Path) -> None:
    done = psp("train", "hparams_search=optuna", "run=single", *tiny)
    assert done.code == 1 and "needs -m" in done.err.splitlines()[-1], done.err
    settings = [*tiny, "trainer.val_every=2", "trainer.limit_val_batches=1", "hydra.sweeper.n_trials=1"]
    done = psp("train", *SEARCH, *settings)
    assert done.code == 0, done.err
    done = psp("train", "resume=sweep/0", "trainer.max_steps=3")
    assert done.code == 0 and "done: step 3" in done.out + done.err, done.err


def test_ctrl_c_interrupts_a_search(search, tmp_path: Path) -> None:
    def job(cfg: Any, trial: Any = None) -> float:
        if cfg.paths.output_dir.endswith("/1"):
            raise KeyboardInterrupt
        return 1.0

    assert search("hydra.sweeper.n_trials=2", job=job).code == 130
    assert states(tmp_path / "sweep") == ["complete", "interrupted"]
    assert search("hydra.sweeper.n_trials=2", job=job).code == 0
    assert states(tmp_path / "sweep") == ["complete", "interrupted", "complete"]


def fails_once(cfg: Any, trial: Any = None) -> float | None:
    from psp_lightning.utils.errors import UserError

    Path(cfg.paths.output_dir, "config.yaml").touch()  # the training has started
    if cfg.paths.output_dir.endswith("/0"):
        raise UserError("the loss is nan.\nDetails.")
    return float("nan") if cfg.paths.output_dir.endswith("/1") else 1.0


def test_a_failed_trial_has_a_row_with_its_reason(search, tmp_path: Path) -> None:
    done = search("hydra.sweeper.n_trials=3", job=fails_once)
    assert done.code == 0, done.err
    assert [(row["state"], row["error"]) for row in table(tmp_path / "sweep")] == [
        ("failed", "the loss is nan."), ("failed", "val/loss has no value."), ("complete", ""),
    ]  # fmt: skip
    assert "| 0 | failed |" in done.out and "best: trial 2, val/loss 1; sweep/sweep.md" in done.out.splitlines()[-1]


def test_too_many_failed_trials_end_the_search(search, tmp_path: Path) -> None:
    done = search("hydra.sweeper.n_trials=3", "hydra.sweeper.max_failure_rate=0", job=fails_once)
    assert done.code == 1 and "1 of 3 trials failed" in done.err.splitlines()[-1], done.err
    assert states(tmp_path / "sweep") == ["failed"]


def test_a_trial_can_be_pruned(search, tmp_path: Path) -> None:
    def job(cfg: Any, trial: Any = None) -> float:
        from psp_lightning.cli.trial import Pruned

        number = int(Path(cfg.paths.output_dir).name)
        opened = trial.open()
        opened.report(float(number), 10)
        return Pruned(number) if opened.should_prune() else float(number)

    median = ["hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1"]
    done = search("hydra.sweeper.n_trials=3", *median, job=job)
    assert done.code == 0, done.err
    assert [(row["state"], row["val/loss"]) for row in table(tmp_path / "sweep")] == [
        ("complete", "0.0"), ("pruned", "1.0"), ("pruned", "2.0"),
    ]  # fmt: skip


@pytest.mark.parametrize("storage", ["studies/a b.db", "studies/journal.log", "sqlite:///url.db"])
def test_another_storage(storage: str, search, tmp_path: Path) -> None:
    own = f"hydra.sweeper.storage='{storage}'"
    for n in (1, 2):
        done = search(f"hydra.sweeper.n_trials={n}", own)
        assert done.code == 0, done.err
    assert states(tmp_path / "sweep") == ["complete", "complete"]
    assert (tmp_path / storage.removeprefix("sqlite:///")).is_file() and not (tmp_path / "sweep" / "study.db").exists()
    done = search("hydra.sweep.dir=other", own)
    assert done.code == 1 and "belongs to the search in" in done.err and "study_name=NAME" in done.err, done.err
    assert search("hydra.sweep.dir=other", own, "hydra.sweeper.study_name=b", "hydra.sweeper.n_trials=1").code == 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be"),
        ("objective=null", "a search needs an objective=NAME"),
        ("trainer.val_every=1e9", "would not be measured"),
        ("optimizer=choice(adam,rangr)", "optimizer=rangr does not exist"),
        ("data.batch_size=range(1,5,0)", "the step must not be 0"),
        ("hydra.sweeper.storage='nosuch://me:secret@host/db'", "nosuch://me:***@host/db: "),
        ("hydra.sweeper.direction=up", "minimize or maximize"),
        ("hydra.sweeper.direction=maximize", "another hydra.sweeper.direction"),
        ("optimizer.lr=choice(1,2)", "Such a range needs a new hydra.sweep.dir=DIR"),
        ("trainer.max_steps=7000", "comparable: trainer.max_steps: 500 -> 7000. Repeat those settings"),
        ("~model.decay_steps", "model.decay_steps: 0 -> not set"),
        ("data.batch_size=int(interval(2,8))", "data.batch_size: 8 -> not set"),
        ("trainer.val_every=range(100,9000,100)", "would not be measured"),
        ("data=dataset", "must be given: data.train._target_=... data.val._target_=..."),
        ("data=folder", "data.cache: True -> not set; data.name: toyfaces -> folder; "),
        ("optimizer.lr=1e-3", "no settings to choose"),
        ("optimizer.lr=interval(2,1)", "optimizer.lr=interval(2,1)"),
        ("optimizer.rate=interval(1,2)", "there is no configuration key 'optimizer.rate'"),
        ("hydra.sweeper.storage=sweep", "hydra.sweeper.storage=sweep: "),
        ("hydra.sweeper.sampler.sed=1", "hydra.sweeper.sampler.sed"),
    ],
)
def test_mistakes_are_messages(setting: str, told: str, search, tmp_path: Path) -> None:
    import optuna

    assert search("hydra.sweeper.n_trials=1").code == 0
    done = search("hydra.sweeper.n_trials=2", setting)
    assert done.code == 1 and told in done.err.split("error: ")[-1], done.err
    assert "Traceback" not in done.err and "secret" not in done.err.split("error: ")[-1]
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/sweep/study.db", study_name="psp-train")
    assert len(study.trials) == 1, "the mistake has added a trial"


def test_a_continued_search_may_change_what_changes_no_result(search, tmp_path: Path) -> None:
    free = ["logger=none", "data.num_workers=1", "callbacks.images=null", "trainer.enable_progress_bar=false",
            "paths.runs=elsewhere", "model.start_from_latent_avg=True",
            "optimizer.lr=tag(log,interval(1e-5,1e-2))"]  # fmt: skip
    assert search("hydra.sweeper.n_trials=1").code == 0
    done = search("hydra.sweeper.n_trials=2", *free)
    assert done.code == 0, done.err
    assert states(tmp_path / "sweep") == ["complete", "complete"]


def test_a_mistake_that_the_first_trial_finds_ends_the_search(search, tmp_path: Path) -> None:
    def mistaken(cfg: Any, trial: Any = None) -> float:
        from psp_lightning.utils.errors import UserError

        raise UserError(f"objective={cfg.objective} is not logged.")

    done = search("hydra.sweeper.n_trials=3", "objective=val/pnsr", job=mistaken)
    assert done.code == 1, done.out
    assert done.err.splitlines()[-1] == "error: trial 0 could not start: objective=val/pnsr is not logged."
    done = search("hydra.sweeper.n_trials=2", "objective=val/psnr")
    assert done.code == 0, done.err
    assert states(tmp_path / "sweep") == ["interrupted", "complete", "complete"]


def test_values_that_end_the_process_are_tried_twice_at_most(search, tmp_path: Path) -> None:
    import optuna

    (tmp_path / "sweep").mkdir()
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/sweep/study.db", study_name="psp-train")
    rates = optuna.distributions.FloatDistribution(0.0001, 0.003, log=True)
    for value in (0.001, 0.001, 0.0029):  # the last one is outside the new range
        study.enqueue_trial({"optimizer.lr": value})
        study.ask({"optimizer.lr": rates})
    done = search("hydra.sweeper.n_trials=2", "optimizer.lr=tag(log,interval(1e-4,2e-3))")
    assert done.code == 0, done.err
    rows = table(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["interrupted"] * 3 + ["complete"] * 2
    assert not {float(row["optimizer.lr"]) for row in rows[3:]} & {0.001, 0.0029}


def test_the_folder_of_another_sweep_is_refused(search, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "result.txt").touch()
    done = search("hydra.sweeper.n_trials=1")
    assert done.code == 1 and "sweep/0 is not a run of this search" in done.err.splitlines()[-1], done.err


@pytest.mark.parametrize(("state", "kind"), [("COMPLETE", "float"), ("PRUNED", "Pruned")])
def test_a_trial_that_slurm_restarts_after_its_end_keeps_its_result(
    state: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    from psp_lightning.cli import trial

    (tmp_path / trial.RESULT).write_text(f'{{"state": "{state}", "value": 0.5}}')
    cfg = OmegaConf.create({"paths": {"output_dir": str(tmp_path)}})
    monkeypatch.setattr(trial, "_is_search", lambda: True)
    assert trial.earlier_result(cfg) is None, "the first start of a job has no result"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    value = trial.earlier_result(cfg)
    assert type(value).__name__ == kind and (value == 0.5 or state == "PRUNED")


def test_ranges_of_hydra_become_distributions() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from psp_lightning.cli.search_space import search_space

    space, fixed = search_space([
        "a=int(interval(1,5))", "b=interval(0.5,2)", "c=tag(log,interval(1e-4,1.0))", "d=choice(true,x,[l2,id])",
        "e=range(1,6,2)", "f=range(0.0,1.0,0.25)", "g=1,2", "h=3", "i=interval(0,1)", "i=7", "task=superres",
    ])  # fmt: skip
    assert space == {
        "a": IntDistribution(1, 5), "b": FloatDistribution(0.5, 2), "c": FloatDistribution(1e-4, 1, log=True),
        "d": CategoricalDistribution([True, "x", "[l2,id]"]), "e": IntDistribution(1, 5, step=2),
        "f": FloatDistribution(0, 0.75, step=0.25), "g": CategoricalDistribution([1, 2]),
    }  # fmt: skip
    assert fixed == ["h=3", "i=7", "task=superres"]

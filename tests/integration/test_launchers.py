"""The jobs of a sweep in other processes: joblib, submitit, and Slurm as far as it can be imitated."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.config.test_catalogue import composed

PACKAGES = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}
# what submitit calls: sbatch runs the script as an array of two jobs, and srun starts one task
SLURM = {
    "sbatch": """cp "$1" submitted.sh
for task in 0 1; do
  SLURM_JOB_ID=$((7 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$1" >>sbatch.out 2>&1 &
done
echo "Submitted batch job 7"
""",
    "srun": """while [[ $1 != */python* ]]; do shift; done
export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
exec "$@"
""",
    "sacct": 'printf "JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n"\n',
    "scancel": "true\n",
}


def steps(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("launcher", PACKAGES)
def test_a_failing_job_does_not_stop_the_others(launcher: str, shell, tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{PACKAGES[launcher]}")
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = shell("train", "-m", "optimizer.lr=1e30,1e-4", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep",
                 "trainer=ddp_cpu", *settings, "trainer.max_steps=8", "trainer.val_every=8", timeout=600)  # fmt: skip
    assert done.code == 1, done.err
    assert "loss term 'l2'" in done.err.splitlines()[-1] and done.err.splitlines()[-1].startswith("error: "), done.err
    assert "Traceback" not in done.err and "ConfigStore" not in done.err, done.err
    for job, lr in (("0", 1e30), ("1", 1e-4)):
        assert yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())["optimizer"]["lr"] == lr
    log = (tmp_path / "sweep" / "1" / "train.log").read_text()
    assert steps(tmp_path / "sweep" / "1") == 8 and log.count("done: step 8") == 1, log
    assert not (tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.serial
def test_jobs_of_slurm_start_their_own_ranks(shell, tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = shell(
        "train", "-m", "seed=1,2", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=big",
        "hydra.sweep.dir=sweep", "trainer=ddp_cpu", *settings, timeout=600,
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    output = "".join(path.read_text() for path in (tmp_path / "sweep" / ".submitit").glob("*/*.out"))
    assert done.code == 0, done.err + output
    for job in ("0", "1"):
        assert steps(tmp_path / "sweep" / job) == 2
        assert yaml.safe_load((tmp_path / "sweep" / job / "config.yaml").read_text())["seed"] == int(job) + 1
        assert (tmp_path / "sweep" / job / "train.log").read_text().count("done: step 2") == 1
    script = (tmp_path / "submitted.sh").read_text()
    for option in ("--partition=big", "--time=1440", "--ntasks-per-node=1", "--nodes=1", "--array=0-1%2"):
        assert f"#SBATCH {option}\n" in script, script
    assert "--gpus" not in script, "a training on the CPU asks for no GPU"


def test_a_job_that_slurm_rejects_ends_the_search(
    psp, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pytest.importorskip("optuna")
    rejecting = 'cp "$1" submitted.sh\necho "sbatch: error: invalid partition specified: tpyo" >&2\nexit 1\n'
    for name, text in {**SLURM, "sbatch": rejecting}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    settings = [item for item in tiny if item != "trainer=cpu"]
    done = psp(
        "train", "-m", "hparams_search=optuna", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=tpyo",
        "hydra.sweep.dir=sweep", "trainer=gpu", "trainer.devices=4", *settings, "trainer.val_every=2",
        "trainer.limit_val_batches=1",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert "invalid partition specified: tpyo" in done.err.split("error: a job of the sweep did not run: ")[1]
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 2 and ",interrupted," in rows[1], rows
    script = (tmp_path / "submitted.sh").read_text()
    assert "#SBATCH --gpus-per-node=4\n" in script and "#SBATCH --partition=tpyo\n" in script, script


MEETING = """
import time
from pathlib import Path
from pytorch_lightning import Callback

class Meet(Callback):
    def on_train_start(self, trainer, pl_module):
        run = Path(trainer.default_root_dir)
        (run / "started").touch()
        end = time.monotonic() + 120
        while not all((run.parent / job / "started").exists() for job in "01"):
            assert time.monotonic() < end, "the other trial did not start within two minutes"
            time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("launcher", PACKAGES)
def test_trials_run_at_the_same_time(launcher: str, shell, tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{PACKAGES[launcher]}")
    pytest.importorskip("optuna")
    (tmp_path / "meeting.py").write_text(MEETING)
    done = shell(
        "train", "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2",
        f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep", *tiny, "trainer.val_every=2",
        "trainer.limit_val_batches=1", "+callbacks.meet._target_=meeting.Meet", timeout=600,
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["complete", "complete"]
    for row in rows:
        result = json.loads((tmp_path / row["run"] / "objective.json").read_text())
        assert result == {"state": "COMPLETE", "value": pytest.approx(float(row["val/loss"]))}


DYING = """
import os, signal
from psp_lightning.cli import train

def job(cfg, trial=None):
    if cfg.paths.output_dir.endswith("/0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0

train.train_job = job
if __name__ == "__main__":
    train.main()
"""


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_has_failed(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("optuna")
    (tmp_path / "dying.py").write_text(DYING)
    command = [sys.executable, "-m", "dying", "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "trainer=cpu",
               "hydra/launcher=joblib", "hydra.sweep.dir=sweep"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["failed", "complete"] and "TerminatedWorkerError" in rows[0]["error"]


def test_a_job_that_slurm_restarts_continues(
    psp, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["-m", "seed=1,2", "hydra.sweep.dir=sweep", *tiny]
    assert psp("train", *sweep).code == 0
    done = psp("train", *sweep, "trainer.max_steps=3")
    assert done.code == 1 and "contains a run already" in done.err.splitlines()[-1], done.err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done = psp("train", *sweep, "trainer.max_steps=3")
    assert done.code == 0, done.err
    for job in ("0", "1"):
        assert steps(tmp_path / "sweep" / job) == 3
        log = (tmp_path / "sweep" / job / "train.log").read_text()
        assert log.count("done: step 2") == 1 and log.count("done: step 3") == 1, log
    assert psp("train", "run=other", *tiny).code == 0, "another run starts as before"
    assert psp("train", "run=other", *tiny).code == 1, "outside a sweep, the folder of a run stays protected"


def test_slurm_is_missing(psp, tiny: list[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = psp("train", "-m", "seed=1,2", "hydra/launcher=submitit_slurm", *tiny)
    assert done.code == 1 and 'Could not detect "srun"' in done.err.split("error: ")[-1], done.err


@pytest.mark.parametrize(
    ("launcher", "install"),
    [("joblib", "psp-lightning[joblib]"), ("submitit_local", "psp-lightning[slurm]")],
)
def test_a_launcher_is_not_installed(launcher: str, install: str, psp, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.plugins import Plugins

    known = Plugins.instance().class_name_to_class
    kept = {name: cls for name, cls in known.items() if PACKAGES[launcher] not in name}
    monkeypatch.setattr(Plugins.instance(), "class_name_to_class", kept)
    done = psp("train", "-m", "seed=1,2", f"hydra/launcher={launcher}")
    assert done.code == 1 and f"pip install '{install}'" in done.err.splitlines()[-1], done.err


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        (["trainer=cpu"], None), (["trainer=ddp_cpu"], None), (["trainer=mps"], None), ([], 1),
        (["trainer=gpu", "trainer.devices=4"], 4), (["trainer=gpu", "trainer.devices=[1,3]"], 4),
    ],
)  # fmt: skip
def test_a_job_asks_for_the_gpus_that_it_trains_on(settings: list[str], gpus: int | None) -> None:
    from omegaconf import OmegaConf

    import psp_lightning.cli.train  # noqa: F401  registers the resolver

    cfg = composed(*settings)
    text = {"launcher": "${psp_gpus:${trainer.accelerator},${trainer.devices}}", "trainer": cfg.trainer}
    assert OmegaConf.create(text).launcher == gpus
    for name in ("submitit_local", "submitit_slurm"):
        path = Path(__file__).parents[2] / "conf" / "hydra" / "launcher" / f"{name}.yaml"
        assert yaml.safe_load(path.read_text())["gpus_per_node"] == text["launcher"]


def test_the_gpus_of_another_machine_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from psp_lightning.utils.devices import gpus_of_a_job
    from psp_lightning.utils.errors import UserError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for accelerator in ("gpu", "auto"):
        with pytest.raises(UserError, match="trainer.devices=auto: .*trainer.devices=NUMBER"):
            gpus_of_a_job(accelerator, "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_of_a_job("gpu", "auto") == 2


def test_gpus_that_cannot_be_counted_are_one_message(psp, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = psp("train", "-m", "seed=1,2", "hydra/launcher=submitit_local", "trainer.devices=auto")
    assert done.code == 1 and done.err.splitlines()[-1].startswith("error: trainer.devices=auto: the jobs' GPUs"), (
        done.err
    )


def test_an_evaluation_takes_no_launcher(psp) -> None:
    done = psp("evaluate", "-m", "ckpt=identity", "hydra/launcher=joblib")
    assert done.code == 1 and "leave out hydra/launcher=" in done.err

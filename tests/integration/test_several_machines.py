"""Ranks that torchrun's agents or srun start, as on two machines; both share this machine's loopback address."""

from __future__ import annotations

import csv
import filecmp
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integration.machines import Start, ranks_in, succeed
from tests.integration.pages import DOCS, blocks, commands

pytestmark = [pytest.mark.slow, pytest.mark.serial]

FOUR = ["trainer.max_steps=4", "trainer.log_every_n_steps=1", "data.train.n=24", "callbacks.last.every_n_steps=1"]
OTHER_VERSION = "import psp_lightning\npsp_lightning.__version__ = '9.9'\n"


def result(run: Path) -> tuple[dict[str, object], list[dict[str, str]]]:
    """Return what a run computed: its checkpoint without paths, and the rows of its log."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    keys = {"state_dict", "optimizer_states", "loops", "global_step", "random_state"} & state.keys()
    with (run / "csv" / "metrics.csv").open() as file:
        return {key: state[key] for key in keys}, list(csv.DictReader(file))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in rows]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains with two ranks on one machine and returns the run folder; it trains once."""
    folder = tmp_path_factory.mktemp("one")
    runs: dict[tuple[str, ...], Path] = {}

    def train(settings: list[str], command: str = "train") -> Path:
        key = (command, *settings)
        if key not in runs:
            name = f"run_{len(runs)}"
            line = [sys.executable, "-m", f"psp_lightning.cli.{command}", *settings, "trainer.devices=2", f"run={name}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                line, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            assert done.returncode == 0, done.stderr
            (runs[key],) = (folder / "runs").glob(f"*/{name}")
        return runs[key]

    return train


def only_run(folder: Path) -> Path:
    runs = list((folder / "runs").glob("*/*"))
    assert len(runs) == 1, f"several folders for one run: {runs}"
    return runs[0]


def test_two_agents_train_and_resume_as_one_machine(start: Start, one_machine, tiny: list[str], tmp_path: Path) -> None:
    settings = [*tiny, *FOUR]
    short = ["trainer.num_nodes=2", "trainer.max_steps=2"]
    succeed(start("torchrun", "train", *settings, *short, delay=1.2))  # the default names of the ranks would differ
    run = only_run(tmp_path)
    assert len(result(run)[0]["random_state"]) == 2, "not both ranks took part"  # type: ignore[arg-type]
    succeed(start("torchrun", "train", "resume=auto", "trainer.max_steps=4", c10d=True))
    assert only_run(tmp_path) == run
    expected, found = result(one_machine(settings)), result(run)
    assert found[0]["global_step"] == 4 and any(row["val/loss"] for row in found[1])
    assert same(expected[0], found[0]), "the checkpoint differs from that of one machine"
    assert expected[1] == found[1], "the log differs from that of one machine"
    log = (run / "train.log").read_text()
    assert log.count("done: step") == 2, f"not only the first rank writes the log: {log}"


def test_a_generator_trains_on_two_machines_as_on_one(start: Start, one_machine, photos: Path, tmp_path: Path) -> None:
    settings = [
        f"data.root={photos}", "domain.size=32", "data.fit=squash", "data.batch_size=2", "data.num_workers=0",
        "trainer=cpu", "trainer.max_steps=4", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "network.style_dim=32", "network.z_dim=32", "network.n_mapping=2", "network.channel_base=256",
        "network.max_channels=32", "callbacks.images=null", "callbacks.last.every_n_steps=1",
    ]  # fmt: skip
    for more in (["trainer.max_steps=2"], ["resume=auto"]):
        succeed(start("torchrun", "train_generator", *settings, "trainer.num_nodes=2", *more, delay=1.2))
    expected, found = result(one_machine(settings, "train_generator")), result(only_run(tmp_path))
    del expected[0]["loops"], found[0]["loops"]  # Lightning counts the steps since the resume there, too
    assert same(expected[0], found[0]), "the checkpoint differs from that of one machine"
    assert without_times(expected[1]) == without_times(found[1]), "the log differs from that of one machine"


STREAM = """
import os
from torch import full
from torch.utils.data import IterableDataset, get_worker_info

class Stream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        parts = 2 * worker.num_workers
        first = int(os.environ["SLURM_PROCID"]) * worker.num_workers + worker.id
        for index in range(first, 24, parts):
            with open(f"seen_{first}", "a") as file:
                file.write(f"{index}\\n")
            image = full((3, 64, 64), index / 24)
            yield {"source": image, "target": image}
"""


def test_a_stream_on_two_machines(
    start: Start, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_stream.py").write_text(STREAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "stream.yaml").write_text(
        "defaults: [dataset]\nname: stream\ntrain:\n  _target_: my_stream.Stream\n"
        "val:\n  _target_: psp_lightning.data.stores.ToyFacesStore\n  size: 64\n  n: 3\n"
    )
    settings = [item for item in tiny if not item.startswith(("data.train", "data.val."))]
    settings += ["--config-dir=conf", "data=stream", "data.num_workers=2", "trainer.max_steps=8", "run=r"]
    succeed(start("srun", "train", *settings, "trainer.num_nodes=2"))
    state, rows = result(tmp_path / "runs" / "inversion" / "r")
    assert state["global_step"] == 8 and len(state["random_state"]) == 2  # type: ignore[arg-type]
    seen = [[int(line) for line in (tmp_path / f"seen_{part}").read_text().split()] for part in range(4)]
    for part, indices in enumerate(seen):  # 6 samples in each of the 4 processes: 6 batches of 2 on a rank per epoch
        assert set(indices) == set(range(part, 24, 4)), "a sample was left out, or another process read it too"
        assert indices[:6] == list(range(part, 24, 4)) and len(indices) > 6, "the second epoch does not start anew"


@pytest.mark.parametrize("told", [(0, 1), (0,), (1,)], ids=str)
def test_sigterm_ends_the_run(told: tuple[int, ...], start: Start, tiny: list[str], tmp_path: Path) -> None:
    """Slurm (--signal) may tell all tasks, at different places in a step, or one: both end after the same step."""
    long = ["trainer.max_steps=5000", "trainer.val_every=5000", "callbacks.images=null", "trainer.log_every_n_steps=1"]
    machines = start("srun", "train", *tiny, *long, "trainer.num_nodes=2", "run=r")
    rows = tmp_path / "runs" / "inversion" / "r" / "csv" / "metrics.csv"
    while not rows.exists() or rows.read_text().count("\n") < 5:
        assert all(machine.process.poll() is None for machine in machines), machines[0].output
        time.sleep(0.1)
    for number in told:
        machines[number].process.send_signal(signal.SIGTERM)
    assert [machine.wait(60) for machine in machines] == [130, 130], machines[0].output
    step = result(rows.parents[1])[0]["global_step"]
    assert step >= 3 and f"stopped at step {step}" in (rows.parents[1] / "train.log").read_text()


def on_the_page(launcher: str, command: str) -> list[str]:
    """Return the arguments of a command in docs/scaling.md, with one process on the CPU for the four on GPUs."""
    lines = [line for block in blocks(DOCS / "scaling.md") for line in commands(block)]
    (line,) = [line for line in lines if line[0] == launcher and f"psp-{command}" in line]
    smaller = {"trainer=ddp": "trainer=cpu", "trainer.devices=4": "trainer.devices=1", "devices=4": "devices=1"}
    return [smaller.get(item, item) for item in line[line.index(f"psp-{command}") + 1 :]]


def test_tasks_of_srun_are_ranks(start: Start, one_machine, tiny: list[str], tmp_path: Path) -> None:
    page = on_the_page("srun", "train")
    for steps in (2, 4):  # the second time, resume=auto finds the run
        succeed(start("srun", "train", *page, *tiny, *FOUR, f"trainer.max_steps={steps}", delay=1.2))
    expected, found = result(one_machine([*tiny, *FOUR])), result(only_run(tmp_path))
    assert same(expected[0], found[0]) and expected[1] == found[1], "the result differs from that of one machine"


def test_commands_of_the_page(start: Start, tiny: list[str], photos: Path, tmp_path: Path) -> None:
    for launcher, command in (("torchrun", "train"), ("torchrun", "predict")):
        lines = [line for block in blocks(DOCS / "scaling.md") for line in commands(block) if line[0] == launcher]
        options = {item for line in lines for item in line[: line.index("--no-python")]}
        assert options == {
            "torchrun", "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500",
            "--rdzv-id=faces",
        }, "`start` uses other options"  # fmt: skip
        settings = on_the_page(launcher, command)
        if command == "train":
            settings += tiny
        else:
            run = only_run(tmp_path)
            (tmp_path / "photos").symlink_to(photos)
            settings = [item.replace("NAME", run.name) for item in settings] + ["progress_bar=false", "num_workers=0"]
        succeed(start(launcher, command, *settings, c10d=True))
    assert len(list((tmp_path / "out").glob("*.png"))) >= 3


def test_a_sweep_has_one_folder(start: Start, tiny: list[str], tmp_path: Path) -> None:
    succeed(start("torchrun", "train", "-m", "seed=1,2", *tiny, "trainer.num_nodes=2", delay=1.2))
    (sweep,) = (tmp_path / "runs" / "multirun").iterdir()
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1"]
    for job in ("0", "1"):
        assert len(result(sweep / job)[0]["random_state"]) == 2  # type: ignore[arg-type]
        assert (sweep / job / "train.log").read_text().count("done: step 2") == 1


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_predictions_and_evaluations_equal_those_of_one_process(
    launcher: str, start: Start, shell, photos: Path, tmp_path: Path
) -> None:
    common = ["ckpt=toyfaces/inversion", "accelerator=cpu", "progress_bar=false", "num_workers=0"]
    predict = [*common, f"input={photos}/face_*.jpg", "batch_size=1"]
    evaluate = [*common, "data=toyfaces", "data.store.n=5", "batch_size=2", "timing=0", "metric=[mse,frechet,kernel]"]
    for command, settings in (("predict", predict), ("evaluate", evaluate)):
        machines = start(launcher, command, *settings, f"output={command}_two", delay=1.2)
        succeed(machines)
        done = shell(command, *settings, f"output={command}_one", OMP_NUM_THREADS="1")
        assert done.code == 0, done.err
        outputs = [machine.output.replace(f"{command}_two", f"{command}_one") for machine in machines]
        assert done.out in outputs[0] and done.out.splitlines()[-1] not in outputs[1], "not one rank reports the result"
    one, two = tmp_path / "predict_one", tmp_path / "predict_two"
    names = sorted(path.name for path in one.iterdir() if path.suffix == ".png")
    assert len(names) == 3 and filecmp.cmpfiles(one, two, names, shallow=False)[0] == names
    lines = [(folder / "manifest.jsonl").read_text().splitlines() for folder in (one, two)]
    assert len(lines[1]) == 3 and [json.loads(line)["status"] for line in lines[1]] == ["ok"] * 3
    one, two = tmp_path / "evaluate_one", tmp_path / "evaluate_two"
    assert (one / "per_image.csv").read_text() == (two / "per_image.csv").read_text()
    metrics = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (one, two)]
    assert metrics[0]["mse"] == metrics[1]["mse"]
    for name in ("frechet", "kernel"):  # sums over sets, whose order depends on the ranks
        assert metrics[0][name]["mean"] == pytest.approx(metrics[1][name]["mean"], rel=1e-9)


def test_more_ranks_than_inputs(start: Start, photos: Path, tmp_path: Path) -> None:
    common = ["ckpt=toyfaces/inversion", "accelerator=cpu", "progress_bar=false", "num_workers=0", "output=out"]
    for written in ("1 written, 0 skipped", "0 written, 1 skipped"):
        machines = start("torchrun", "predict", *common, f"input={photos}/face_0.jpg")
        succeed(machines)
        assert written in machines[0].output
    machines = start("torchrun", "evaluate", *common, "data=toyfaces", "data.store.n=2", "batch_size=2")
    assert [machine.wait() for machine in machines] == [1, 1]
    assert (
        "torchrun started 2 processes, but the images fill only 1 batch of 2. Start at most 1" in machines[0].errors[0]
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel ends the rank of a killed agent")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_agent_ends_the_run_and_a_resume_continues_it(
    victim: int, start: Start, shell, one_machine, tiny: list[str], tmp_path: Path
) -> None:
    settings = [*tiny, *FOUR, "trainer.max_steps=30"]
    machines = start("torchrun", "train", *settings, "trainer.num_nodes=2", "run=r")
    run = tmp_path / "runs" / "inversion" / "r"
    deadline = time.time() + 120
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert time.time() < deadline and all(machine.process.poll() is None for machine in machines)
        time.sleep(0.05)
    machines[victim].process.kill()
    machines[victim].wait()
    survivor = machines[1 - victim]
    killed = time.time()
    assert survivor.wait(60) == 1, f"{time.time() - killed:.0f} s: {survivor.output}"
    (line,) = survivor.errors
    assert "another process of this run has ended" in line and f"Continue with resume={run}" in line, line
    assert "[rank" not in survivor.output, f"a traceback of the rank: {survivor.output}"
    while left := ranks_in(tmp_path):
        assert time.time() < killed + 60, f"ranks {left} outlived the run"
        time.sleep(0.2)
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step < 30, "the run ended before its agent was killed"
    if victim:
        succeed(start("torchrun", "train", "resume=runs/inversion/r"))
    else:  # on the machine that is left
        done = shell(
            "train", "resume=runs/inversion/r", "trainer.num_nodes=1", "trainer.devices=2", OMP_NUM_THREADS="1"
        )
        assert done.code == 0, done.err
    expected, found = result(one_machine(settings)), result(run)
    assert same(expected[0], found[0]) and expected[1] == found[1], f"resumed after step {step}, the run differs"


def test_a_wrong_number_of_machines_is_refused(start: Start, tiny: list[str], tmp_path: Path) -> None:
    machines = start("torchrun", "train", *tiny)
    assert [machine.wait() for machine in machines] == [1, 1]
    for machine in machines:
        assert "torchrun started 2 processes in total" in machine.errors[0]
        assert "Set trainer.num_nodes=2" in machine.errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_unequal_versions_are_refused(launcher: str, start: Start, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(OTHER_VERSION)
    path = os.pathsep.join(filter(None, [str(tmp_path / "other"), os.environ.get("PYTHONPATH")]))
    machines = start(launcher, "train", *tiny, "trainer.num_nodes=2", env={"PYTHONPATH": path})
    assert [machine.wait() for machine in machines] == [1, 1]
    for machine in machines:
        (line,) = machine.errors
        assert f"process 1 on {socket.gethostname()} has psp_lightning 9.9, but process 0" in line, line
        assert "Install the same versions on all machines." in line
    assert not (tmp_path / "runs").exists()


def test_a_port_that_is_taken_is_named(start: Start, tiny: list[str], tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        (first,) = start("srun", "train", *tiny, "trainer.num_nodes=2", port=port, only=(0,))
        assert first.wait() == 1
    (line,) = first.errors
    assert line.startswith(f"error: port {port} of {socket.gethostname()} is taken") and "Set MASTER_PORT" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (0, "not all 2 processes have started after 3 seconds"),
        (1, "the first of 2 processes does not answer at 127.0."),
    ],
)
def test_a_machine_that_does_not_start_is_reported(
    node: int, words: str, start: Start, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import psp_lightning.cli.ranks as ranks\nranks.CONTACT = 3\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    (machine,) = start("srun", "train", *tiny, "trainer.num_nodes=2", only=(node,))
    assert machine.wait() == 1
    (line,) = machine.errors
    assert words in line and "Check that the command runs on all machines" in line, line


def test_a_search_is_refused(psp, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = psp("train", "-m", "hparams_search=optuna", "trainer.devices=2")
    assert done.code == 1 and "OptunaSweeper does not work under torchrun or srun" in done.err, done.err

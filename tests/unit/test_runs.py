"""Run folders as their files describe them, and learning curves."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_lightning.cli.runs import choose_runs, ordered
from psp_lightning.lit.curves import by_value, last_step, read_log, save_curves, thin
from psp_lightning.lit.run_folder import claim_run, is_claimed
from psp_lightning.lit.runs import find_runs, read_run
from psp_lightning.utils.errors import UserError
from tests.unit.run_files import write_messages, write_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "inversion" / "exp" / "a"), tmp_path)
    assert (run.name, run.task, run.state, run.step, run.steps) == ("exp/a", "inversion", "finished", 40, 40)
    assert run.best is not None and (run.best.name, run.best.value, run.best.step) == ("val/loss", 1 / 40, 40)
    assert run.seconds == 10 and run.reason == ""


def test_the_best_value_follows_what_the_run_monitors(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "inversion" / "a")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("val/loss", "val/psnr").replace("mode: min", "mode: max"))
    with (folder / "csv" / "metrics.csv").open("a") as file:
        file.write("50,,,,,nan\n")
    best = read_run(folder, tmp_path).best
    assert best is not None and (best.name, best.mode, best.value, best.step) == ("val/psnr", "max", 14.0, 40)


def test_states(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "multirun" / "s" / "0", done=20)
    assert read_run(folder, tmp_path).state == "interrupted"
    sweep = claim_run(folder.parent, True, "")
    assert read_run(folder, tmp_path).state == "interrupted", "the sweep is running, but not this job"
    sweep.release()
    claim = claim_run(folder, True, "")
    assert is_claimed(folder) and read_run(folder, tmp_path).state == "running"
    claim.release()
    assert not is_claimed(folder) and read_run(folder, tmp_path).state == "interrupted"
    write_messages(folder, [(20, "done: step 20; last.ckpt")])  # a callback stopped it early
    assert read_run(folder, tmp_path).state == "finished"


def test_a_pruned_run_has_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "search" / "0", done=20)
    write_messages(folder, [(12, "pruned: step 20, val/loss 0.0500; last.ckpt")])
    run = read_run(folder, tmp_path)
    assert (run.state, run.step, run.seconds) == ("pruned", 20, 12)
    write_messages(folder, [(101, f"inversion; run directory {folder}")])  # resume=, and killed
    assert read_run(folder, tmp_path).state == "interrupted"


def test_runs_of_sweeps_are_named_after_their_sweep(tmp_path: Path) -> None:
    for sweep in ("seeds", "search", "multirun/2024", "inversion/exp"):
        claim_run(tmp_path / sweep, True, "").release()
        write_run(tmp_path / sweep / "0")
    claim_run(write_run(tmp_path / "inversion" / "a"), True, "").release()
    write_run(tmp_path / "inversion" / "a" / "nested")  # in a run, not in a sweep
    names = [read_run(folder, tmp_path).name for folder in find_runs(tmp_path)]
    assert names == ["a", "a/nested", "exp/0", "2024/0", "search/0", "seeds/0"]
    for home in ("seeds", "seeds/0", "search"):  # psp-runs runs=DIR
        assert read_run(tmp_path / "seeds" / "0", tmp_path / home).name == "seeds/0"
    assert read_run(tmp_path / "inversion" / "a", tmp_path / "seeds").name == "a"
    assert choose_runs(["seeds/0", "search/0"], tmp_path) == [tmp_path / "seeds" / "0", tmp_path / "search" / "0"]


def test_a_look_at_a_run_does_not_stop_a_training_from_starting(tmp_path: Path) -> None:
    from threading import Timer

    from filelock import FileLock

    look = FileLock(tmp_path / ".claim", thread_local=False)
    look.acquire()
    Timer(0.1, look.release).start()
    claim_run(tmp_path, False, "").release()


def test_seconds_of_all_parts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "inversion" / "a", done=20)  # starts at 12:00:00 and is killed
    write_messages(folder, [(7, "step 17 of 40: about 9 min to go")], "psp_lightning.lit.callbacks.forecast")
    write_messages(folder, [(100, "not measuring id")], "psp_lightning.build.training")
    write_messages(folder, [(101, f"inversion; run directory {folder}"), (104, "stopped at step 30; continue with")])
    write_messages(folder, [(200, "changed on resume: x"), (201, f"inversion; run directory {folder}")])
    changed = datetime(2024, 1, 5, 12, 3, 26, 250_000).timestamp()  # 206 s
    for file in ("train.log", "csv/metrics.csv"):
        os.utime(folder / file, (changed, changed))
    run = read_run(folder, tmp_path)
    assert run.seconds == pytest.approx(7 + 3 + 5) and run.state == "interrupted" and run.step == 30


@pytest.mark.parametrize(("written", "seconds"), [("12:00:50.250", 50), ("12:00:03.250", 7)])
def test_a_killed_part_lasts_until_the_checkpoint_that_is_resumed(written: str, seconds: int, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "inversion" / "a", done=20)
    write_messages(folder, [(7, "step 17 of 40: about 9 min to go")], "psp_lightning.lit.callbacks.forecast")
    resumed = f"resuming at step 20 from {folder}/checkpoints/last.ckpt, written 2024-01-05 {written}"
    write_messages(folder, [(100, resumed), (101, f"inversion; run directory {folder}"), (104, "done: step 40; x")])
    assert read_run(folder, tmp_path).seconds == pytest.approx(seconds + 3)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.yaml", b"a: [", "config.yaml cannot be read"),
        ("config.yaml", b"text", "contains no settings"),
        ("csv/metrics.csv", b"step,a\n1,2,3\n", "line 2: 3 values instead of 2"),
        ("csv/metrics.csv", b"step,a\n1,x\n", "line 2: could not convert"),
        ("csv/metrics.csv", b"a\n1\n", "no column 'step'"),
        ("checkpoints/last.ckpt", b"PK", "last.ckpt is incomplete"),
    ],
)
def test_a_damaged_run_is_described(file: str, content: bytes, reason: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "inversion" / "a")
    (folder / file).write_bytes(content)
    run = read_run(folder, tmp_path)
    assert run.state == "damaged" and reason in run.reason and "\n" not in run.reason
    (folder / file).unlink()
    assert bool(read_run(folder, tmp_path).reason) == (file == "config.yaml")


def test_a_row_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "inversion" / "a")
    with (folder / "csv" / "metrics.csv").open("a") as file:
        file.write("50,0.")
    run = read_run(folder, tmp_path)
    assert run.reason == "" and last_step(run.log) == 40


def test_runs_are_found_in_any_depth(tmp_path: Path) -> None:
    names = ["inversion/a", "inversion/a/nested", "inversion/exp/b", "multirun/s/0", "top"]
    for name in names:
        write_run(tmp_path / name)
    (tmp_path / "inversion/a/checkpoints/csv").mkdir()  # no run
    (tmp_path / "inversion/a/checkpoints/csv/metrics.csv").touch()
    (tmp_path / "inversion/failed").mkdir()
    (tmp_path / "inversion/failed/train.log").touch()
    (tmp_path / "multirun/s/.claim").touch()
    found = [os.path.relpath(folder, tmp_path) for folder in find_runs(tmp_path)]
    assert sorted(found) == sorted([*names, "inversion/failed"])
    failed = read_run(tmp_path / "inversion/failed", tmp_path)
    assert (failed.state, failed.step, failed.steps, failed.reason) == ("interrupted", 0, None, "")


def test_orders(tmp_path: Path) -> None:
    for k, name in enumerate(("c", "a", "b")):
        folder = write_run(tmp_path / "inversion" / name, seed=(2, 0, 1)[k], done=(40, 20, 40)[k])
        for file in ("train.log", "csv/metrics.csv"):
            os.utime(folder / file, (k, k))
    (tmp_path / "inversion" / "b" / "csv" / "metrics.csv").unlink()
    runs = [read_run(folder, tmp_path) for folder in find_runs(tmp_path)]
    names = {sort: "".join(run.name for run in ordered(runs, sort)) for sort in ("newest", "name", "best", "steps")}
    assert names == {"newest": "bac", "name": "abc", "best": "acb", "steps": "bca"}


def test_runs_are_chosen_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("runs")
    for name in ("inversion/a", "inversion/lr=1", "superres/a", "multirun/s/0"):
        write_run(home / name)
    chosen = choose_runs(["lr=1", "s/0", "superres/a", "runs/inversion/a/"], home)
    assert [os.fspath(folder.relative_to(home)) for folder in chosen] == [
        "inversion/lr=1", "multirun/s/0", "superres/a", "inversion/a",
    ]  # fmt: skip
    for names, message in [
        ([], "at least two runs; none is given"),
        (["lr=1"], "at least two runs; only 'lr=1' is given"),
        (["lr=1", "a"], "'a' is the name of 2 runs. Write inversion/a or superres/a."),
        (["lr=1", "lr=2"], "no run 'lr=2'. Did you mean 'lr=1'?"),
        (["lr=1", "inversion/lr=1"], "given twice"),
        (["lr=1", "runs/superres"], "not the folder of a run. It contains 1 run, such as runs/superres/a"),
        (["lr=1", "s/0", "ouf=x.html"], "neither a run nor a setting. Did you mean 'out'?"),
        (["lr=1", "zzz"], "psp-runs runs=runs lists all runs"),
    ]:
        with pytest.raises(UserError) as error:
            choose_runs(names, home)
        assert message in str(error.value)


def test_curves_are_grouped_by_value_with_losses_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    values = by_value(read_log(folder / "csv" / "metrics.csv"))
    assert list(values) == ["loss", "loss_l2", "lr", "psnr"]
    assert list(values["loss"]) == ["train", "val"] and values["loss"]["val"].tolist() == [[20, 0.05], [40, 0.025]]


def test_long_curves_are_averaged() -> None:
    points = np.stack([np.arange(1000.0), np.ones(1000)], 1)
    points[5, 1] = np.nan
    shown = thin(points, 100)
    assert shown.shape == (100, 2) and np.isfinite(shown).all() and (shown[:, 1] == 1).all()
    assert shown[0, 0] < 10 and shown[-1, 0] > 990


def test_a_picture_of_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = read_log(write_run(tmp_path / "a") / "csv" / "metrics.csv")
    assert save_curves(tmp_path / "curves.png", log)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 300  # four values in two rows
    assert not save_curves(tmp_path / "none.png", {}) and not (tmp_path / "none.png").exists()

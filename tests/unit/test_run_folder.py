"""Claims on run folders."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from psp_lightning.lit.run_folder import claim_run, claimed, contains_run, is_claimed, last_checkpoint, new_folder
from psp_lightning.utils.errors import UserError

CLAIM = "import sys, pathlib; from psp_lightning.lit.run_folder import claim_run; "
CLAIM += "claim = claim_run(pathlib.Path(sys.argv[1]), False, ''); print('claimed', flush=True); sys.stdin.read()"


def test_a_claim_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "claimed\n"
    for resume in (False, True):
        with pytest.raises(UserError, match="Another process is writing to .*run; wait until it ends. do this"):
            claim_run(run, resume, "do this")
    other.kill()
    other.communicate()
    claim_run(run, False, "").release()


def test_a_claim_of_a_block_ends_with_it(tmp_path: Path) -> None:
    with claimed(tmp_path, False, ""):
        assert is_claimed(tmp_path)
    assert not is_claimed(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_allows_no_claims(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path, False, ""):
        assert not is_claimed(tmp_path)
        claim_run(tmp_path, False, "").release()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="contains a run already"):
        claim_run(tmp_path, False, "")


def test_a_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert last_checkpoint(tmp_path) is None
    for second, name in enumerate(["step_1.ckpt", "best.ckpt", ".half.ckpt", "last.ckpt", "step_2.ckpt"]):
        (folder / name).touch()
        os.utime(folder / name, (second, second))
        expected = {"step_1.ckpt": "step_1.ckpt", "best.ckpt": "best.ckpt", ".half.ckpt": "best.ckpt"}
        assert last_checkpoint(tmp_path) == folder / expected.get(name, "last.ckpt")


@pytest.mark.parametrize("file", ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "generator_00000010.safetensors"])
def test_no_run_starts_over_another_one(file: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".half.ckpt").touch()  # what a crash leaves
    (tmp_path / "run" / "train.log").touch()
    claim_run(tmp_path / "run", False, "").release()
    (tmp_path / "run" / file).touch()
    assert contains_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"contains a run already\. Do this"):
        claim_run(tmp_path / "run", False, "Do this")
    claim_run(tmp_path / "run", True, "").release()


def test_a_job_that_slurm_restarts_waits_for_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system keeps the lock of a lost machine for some time."""
    monkeypatch.setattr("psp_lightning.lit.run_folder.PATIENCE", 0.05)
    held = claim_run(tmp_path, True, "")
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(UserError, match="Another process is writing"):
            pool.submit(claim_run, tmp_path, True, "").result()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        waiting = pool.submit(lambda: claim_run(tmp_path, True, "").release())
        time.sleep(0.3)
        try:
            assert not waiting.done(), "the restarted job does not wait"
        finally:
            held.release()
        waiting.result(10)


def test_runs_of_the_same_second_get_their_own_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs" / "12-00-00"), range(20)))
    assert len(set(folders)) == 20 and all(folder.is_dir() for folder in folders)
    assert {folder.name for folder in folders} == {"12-00-00", *(f"12-00-00_{n}" for n in range(2, 21))}

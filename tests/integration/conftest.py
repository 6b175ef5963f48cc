"""Fixtures that run the commands in this process (fast) or as subprocesses (as a user does)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = [
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.val_every=2",
    "trainer.enable_progress_bar=false",
    "data.batch_size=2",
    "data.val_batch_size=2",
    "data.val.n=3",
    "data.train.n=6",
    "model.latent_avg_samples=64",
    "callbacks.images.every_n_steps=2",
]


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def psp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function: `psp("train", "task=inversion")` runs psp-train in tmp_path, within this process."""

    def call(command: str, *arguments: str) -> Result:
        from hydra.core.global_hydra import GlobalHydra

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"psp-{command}", *map(str, arguments)])
        module = importlib.import_module(f"psp_lightning.cli.{command}")
        GlobalHydra.instance().clear()
        capfd.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def shell(tmp_path: Path) -> Command:
    """Return the same function for subprocesses, which use the tests' interpreter."""

    def call(command: str, *arguments: str, timeout: int = 300, cwd: Path = tmp_path, **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", f"psp_lightning.cli.{command}", *map(str, arguments)],
            cwd=cwd, capture_output=True, text=True, errors="surrogateescape", timeout=timeout,
            env={**os.environ, **env},
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def tiny() -> list[str]:
    """Return the settings of a run of two steps with two samples per batch."""
    return list(TINY)

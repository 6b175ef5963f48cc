"""curves.png of a training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

import psp_lightning
from tests.integration.test_run_folders import GENERATOR, TINY

RUN = Path("runs", "inversion", "a")


def test_a_training_draws_its_curves(psp, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = psp("train", *TINY, "trainer.max_steps=2", "trainer.log_every_n_steps=1", "run=a")
    assert done.code == 0, done.err
    with Image.open(tmp_path / RUN / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000  # at least three values
    assert not [path for path in (tmp_path / RUN).iterdir() if path.suffix == ".png" and path.name[0] == "."]


def test_a_generators_training_draws_its_curves(psp, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = psp("train_generator", *GENERATOR, "run=a")
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "generator" / "a" / "curves.png").is_file()


def test_curves_can_be_left_out(psp, tmp_path: Path) -> None:
    done = psp("train", *TINY, "callbacks.curves=null", "run=a")
    assert done.code == 0 and not (tmp_path / RUN / "curves.png").exists(), done.err
    done = psp("train", *TINY, "logger=none", "run=b")
    assert done.code == 0 and not (tmp_path / RUN.with_name("b") / "curves.png").exists(), done.err


def test_a_missing_package_is_one_line_and_no_failure(psp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    done = psp("train", *TINY, "trainer.max_steps=2", "run=a")
    lines = [line for line in (tmp_path / RUN / "train.log").read_text().splitlines() if "curves.png" in line]
    assert done.code == 0 and len(lines) == 1, done.err
    assert "matplotlib" in lines[0] and "pip install 'psp-lightning[demo]'" in lines[0]


def test_a_picture_that_cannot_be_written_does_not_end_the_training(psp, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder" / "curves.png").mkdir(parents=True)
    done = psp("train", *TINY, "trainer.max_steps=2", "callbacks.curves.folder=folder", "run=a")
    assert done.code == 0, done.err
    assert (tmp_path / RUN / "train.log").read_text().count("curves.png is not drawn: ") == 1
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["curves.png"]


def test_a_training_from_python_draws_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    options = {"losses": {"l2": 1.0}, "steps": 1, "batch_size": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    psp_lightning.fit("inversion", psp_lightning.ToyFaces(n=4), run="run", **options)
    assert (tmp_path / "run" / "curves.png").is_file()

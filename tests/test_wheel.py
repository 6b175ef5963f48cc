"""The built wheel in its own environment, away from the checkout: configuration, training, prediction."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = ["trainer=cpu", "trainer.max_steps=2", "trainer.val_every=2", "data.batch_size=2", "data.val.n=2"]
MINE = """# @package _global_
defaults:
  - override /task: superres
optimizer:
  lr: 0.003
"""


def run(*command: object, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=clean, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies take gigabytes, so the current environment's are used. A path in a .pth file does not load the
    # .pth files in that path, so the editable installation of the checkout is not used.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert list((site / "psp_lightning" / "ops" / "cuda" / "csrc").glob("*.cu")), (
        "the wheel does not contain the sources of the kernels"
    )
    where = run(python, "-c", "import psp_lightning; print(psp_lightning.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path)), f"the checkout was imported: {where}"

    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(MINE)
    bin_folder = tmp_path / "env" / "bin"
    shown = run(bin_folder / "psp-train", "--config-dir", "own", "experiment=mine", "--cfg", "job", cwd=tmp_path)
    assert "lr: 0.003" in shown and "name: superres" in shown
    run(bin_folder / "psp-train", "--config-dir", "own", "experiment=mine", *TINY, "run=r", cwd=tmp_path)
    shown = run(bin_folder / "psp-train-generator", "trainer=cpu", "logger=none", "--cfg", "job", cwd=tmp_path)
    assert "accelerator: cpu" in shown and "channel_base" in shown
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    run(bin_folder / "psp-predict", "ckpt=runs/superres/r", "input=x.png", "output=out", "num_workers=0", cwd=tmp_path)
    assert Image.open(tmp_path / "out" / "x.png").size == (64, 64)
    run(bin_folder / "psp-data", "toyfaces", "out=faces", "n=2", "size=32", cwd=tmp_path)
    assert len(list((tmp_path / "faces").rglob("*.jpg"))) == 2

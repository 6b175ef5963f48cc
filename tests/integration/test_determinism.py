"""Two runs of a command agree bit for bit, with any number of threads and with batches of one image.

Each command runs several times in one fresh process, which does not inherit MKL_CBWR: the command must set it before
the first product. Without it, MKL changes the order of sums from run to run on Intel processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psp_lightning.utils.reproducibility import VALUE, VARIABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch comes without MKL"),
]

THREADS = (1, 2, 4)
# Call the command as a script does. The command is the first to import PyTorch, with OMP_NUM_THREADS threads.
PROGRAM = """
import importlib, json, os, sys
main = importlib.import_module(sys.argv[1]).main
for threads, arguments in json.loads(sys.argv[2]):
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    sys.argv = [sys.argv[0], *arguments]
    main()
    from psp_lightning.utils.reproducibility import arithmetic
    state = arithmetic()
    assert state["threads"] == threads and state["mkl"].endswith(",STRICT"), state
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write seven drawn faces of 64 px."""
    out = tmp_path_factory.mktemp("faces")
    command = [sys.executable, "-m", "psp_lightning.cli.data", "toyfaces", f"out={out}", "n=7", "size=64"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out / "CelebA-HQ-img"


def run_twice(command: str, folder: Path, *arguments: str) -> None:
    """Run a command twice with each number of threads; `NAME` in the arguments becomes 1a, 1b, 2a, ..."""
    runs = [
        (n, [argument.replace("NAME", f"{n}{run}") for argument in arguments]) for n in THREADS for run in ("a", "b")
    ]
    # remove the value that this process has set, but keep one that the user has set
    inherited = {key: value for key, value in os.environ.items() if (key, value) != (VARIABLE, VALUE)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"psp_lightning.cli.{command}", json.dumps(runs)],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env={**inherited, "OMP_NUM_THREADS": str(THREADS[0])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def differing(a: object, b: object, name: str = "") -> list[str]:
    """Return the names of the entries in which two checkpoints differ."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differing(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def assert_equal_checkpoints(runs: Path) -> None:
    for n in THREADS:
        a, b = (torch.load(runs / f"{n}{run}" / "checkpoints" / "last.ckpt", weights_only=True) for run in ("a", "b"))
        for key in ("state_dict", "optimizer_states"):
            found = differing(a[key], b[key])
            assert not found, f"{n} threads: {len(found)} parts of {key} differ, the first is {found[0]}"
        moved = [value for value in a["optimizer_states"][0]["state"].values() if value["exp_avg"].abs().max() > 0]
        assert len(moved) > 5, "too few weights were trained"


def test_training(tmp_path: Path) -> None:
    """With seven samples in batches of two, the last step has one image."""
    run_twice(
        "train", tmp_path, "trainer=cpu", "trainer.max_steps=4", "trainer.val_every=4", "data.train.n=7",
        "trainer.enable_progress_bar=false", "callbacks.images=null", "data.batch_size=2", "data.val_batch_size=2",
        "data.val.n=3", "data.num_workers=0", "model.latent_avg_samples=64", "model.warmup_steps=1", "run=NAME",
    )  # fmt: skip
    assert_equal_checkpoints(tmp_path / "runs" / "inversion")


def test_training_of_a_generator(faces: Path, tmp_path: Path) -> None:
    """Both penalties are computed in each step, and path lengths are those of one image."""
    run_twice(
        "train_generator", tmp_path, f"data.root={faces}", "trainer=cpu", "network=toyfaces", "trainer.max_steps=4",
        "trainer.enable_progress_bar=false", "callbacks.images=null", "data.batch_size=2", "data.num_workers=0",
        "model.r1_every=1", "model.path_every=1", "model.augment=fixed", "model.augment_p=0.5", "run=NAME",
    )  # fmt: skip
    assert_equal_checkpoints(tmp_path / "runs" / "generator")


def test_prediction(faces: Path, tmp_path: Path) -> None:
    """The last of four batches has one image."""
    run_twice(
        "predict", tmp_path, "ckpt=toyfaces/inversion", f"input={faces}", "output=NAME", "batch_size=2",
        "num_workers=0", "latents=true", "accelerator=cpu",
    )  # fmt: skip
    for n in THREADS:
        a, b = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
            for folder in (tmp_path / f"{n}a", tmp_path / f"{n}b")
        )
        for written in (a, b):
            del written[Path("manifest.jsonl")]  # contains the folder's name
        assert len(a) >= 14 and a.keys() == b.keys()
        assert [str(name) for name in a if a[name] != b[name]] == [], f"{n} threads"

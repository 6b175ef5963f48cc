"""20 steps equal 10 steps, kill -9, resume, 10 steps: weights, metrics and data order are identical."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from psp_lightning.utils.reproducibility import VALUE, VARIABLE

pytestmark = pytest.mark.serial

SETTINGS = [
    "trainer.max_steps=20",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.last.every_n_steps=10",
    "callbacks.images=null",
    "data.batch_size=2",
    "data.val_batch_size=2",
    "data.val.n=3",
    "model.latent_avg_samples=64",
    "model.warmup_steps=15",
    "optimizer.lr=1e-3",
]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command without this process's MKL_CBWR."""
    command = [sys.executable, "-m", "psp_lightning.cli.train", *arguments]
    inherited = {key: value for key, value in os.environ.items() if (key, value) != (VARIABLE, VALUE)}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=inherited
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill_after(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Send kill -9 once the checkpoint of `step` exists and training has continued."""
    checkpoint, log = run / "checkpoints" / "last.ckpt", run / "order.txt"
    deadline = time.time() + 240
    while time.time() < deadline:
        if checkpoint.exists() and log.exists() and log.read_text().count("\n") > step:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("no checkpoint appeared")


def final(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]
    return a == b


# 7 samples in batches of 2: steps 4, 7, 11, ... end in the middle of an epoch; 10 samples: step 10 ends one exactly
@pytest.mark.slow
@pytest.mark.parametrize(("n", "val_every", "ranks"), [(7, 5, 1), (10, 4, 1), (7, 5, 2)])
def test_resume_is_bit_exact(n: int, val_every: int, ranks: int, tmp_path: Path) -> None:
    plugin = tmp_path / "order_plugin.py"
    plugin.write_text(
        "import os, time\n"
        "from pytorch_lightning.callbacks import Callback\n"
        "class Order(Callback):\n"
        "    def __init__(self, folder): self.folder = folder\n"
        "    def on_train_batch_start(self, trainer, module, batch, i):\n"
        "        name = 'order.txt' if trainer.global_rank == 0 else f'order_{trainer.global_rank}.txt'\n"
        "        with open(os.path.join(self.folder, name), 'a') as f:\n"
        "            f.write(f'{trainer.global_step} {batch[\"path\"]}\\n')\n"
        "        time.sleep(0.1)\n"
    )
    trainer = "trainer=cpu" if ranks == 1 else "trainer=ddp_cpu"
    order = ["+callbacks.order._target_=order_plugin.Order", "+callbacks.order.folder=${paths.output_dir}"]
    settings = [trainer, *SETTINGS, f"data.train.n={n}", f"trainer.val_every={val_every}", *order]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    try:
        whole = start(tmp_path, *settings, "run=whole")
        finish(whole)
        cut_run = tmp_path / "runs" / "inversion" / "cut"
        cut = start(tmp_path, *settings, "run=cut")
        kill_after(cut, cut_run, 12)
        assert final(cut_run)["global_step"] == 10
        for file in cut_run.glob("order*.txt"):  # samples seen after the checkpoint are seen again
            lines = file.read_text().splitlines()
            file.write_text("".join(line + "\n" for line in lines[:10]))
        # in one of the cases, the encoder is recomputed in the backward pass, which changes no number
        more = ["model.checkpointing=true"] if n == 10 else []
        finish(start(tmp_path, "resume=auto" if ranks == 1 else f"resume={cut_run}", "run=cut", *more))
    finally:
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].removeprefix(str(tmp_path)).removeprefix(os.pathsep)
    whole_run = tmp_path / "runs" / "inversion" / "whole"
    recorded = yaml.safe_load((whole_run / "arithmetic.yaml").read_text())  # written by the rank that trained
    assert recorded["mkl"] == "no MKL" or recorded["mkl"].endswith(",STRICT"), "products of a rank are not reproducible"
    for file in whole_run.glob("order*.txt"):
        assert file.read_text() == (cut_run / file.name).read_text(), f"another data order in {file.name}"
    a, b = final(whole_run), final(cut_run)
    assert a["global_step"] == b["global_step"] == 20
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_state"):
        assert equal(a[key], b[key]), f"{key} differs after the resume"
    best = [
        [state["best_model_score"] for state in c["callbacks"].values() if "best_model_score" in state] for c in (a, b)
    ]
    assert best[0] and equal(*best)
    rows = [list(csv.DictReader((run / "csv" / "metrics.csv").open())) for run in (whole_run, cut_run)]
    assert rows[0] == rows[1], "metrics.csv differs after the resume"
    assert [int(r["step"]) for r in rows[0] if r["train/loss"]] == list(range(1, 21))

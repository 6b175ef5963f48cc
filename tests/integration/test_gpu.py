"""Tests that need a CUDA device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning import PSP
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.inference.fixed_batch import FixedBatch
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops.check import relative_error
from tests.integration.machines import succeed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REFINED = "toyfaces/inversion_refined"
FROZEN_REFINER = ["task=inversion", "refiner=features", f"init_from={REFINED}", "refiner.resolution=32"]
FROZEN_REFINER += ["refiner.width=48", "encoder=gradual_small"]
TRAININGS = {
    "pSp": [],
    "refiner": FROZEN_REFINER,
    "e4e": ["experiment=toyfaces_e4e", "editability.start=1", "editability.every=1", "editability.pool=2"],
    "ReStyle": ["experiment=toyfaces_restyle", "encoder.iterations=2"],
}
# settings of psp-predict and psp-evaluate, and the largest mean difference from the CPU in levels of 255
INVERSIONS = {
    "codes": (["refine=none"], 0.5),
    "features": (["refine=features"], 0.5),
    "features, CUDA graph": (["refine=features", "cuda_graphs=true"], 0.5),
    "features, compiled": (["refine=features", "compile=true"], 0.5),
    "features, bfloat16": (["refine=features", "precision=bf16"], 2),
    "optimised codes": (["refine=optimize", "refine.steps=3"], 1),
    "optimised features": (["refine=optimize", "refine.space=features", "refine.steps=3"], 1),
    "weights": (["refine=optimize", "refine.space=weights", "refine.steps=3"], 1),
}


@pytest.fixture
def faces(shell, tmp_path: Path) -> Path:
    """Draw three faces and return their folder."""
    assert shell("data", "toyfaces", "out=data", "n=3", "size=64").code == 0
    return tmp_path / "data" / "CelebA-HQ-img"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generator_and_encoder_agree_with_the_cpu(full_float32: None) -> None:
    torch.manual_seed(0)
    generator = Generator(64, style_dim=64, n_mapping=2, max_channels=64)
    net = PSP(GradualStyleEncoder(10, 64, 3, 64, blocks=(1, 1, 1, 1), width=16), generator).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        found = net.cuda()(x.cuda())
    assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refined_network_agrees_with_the_cpu(full_float32: None, dtype: torch.dtype) -> None:
    """The shipped refiner, eager, under autocast, compiled and as a CUDA graph."""
    net = PSP.from_pretrained(REFINED)
    faces = ToyFaces(size=64, seed=9, n=2)
    x = torch.stack([faces[i]["image"] for i in range(2)])
    with torch.no_grad():
        expected = net(x)
        there, y = net.cuda(), x.cuda()
        fast = there.for_inference(dtype)
        forms = {"fast": fast(y), "compiled": torch.compile(there, backend="aot_eager", fullgraph=True)(y)}
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            forms["plain"] = there(y)
        graph = FixedBatch(fast, 2, compile=False, graph=True)
        forms["graph"] = graph(y)
        assert [*graph._replays.values()] != [fast], "no graph was captured"
    for name, found in forms.items():
        if dtype == torch.float32:
            assert relative_error(found, expected) <= 1e-3, name
        else:
            assert (found.float().cpu() - expected).abs().mean() <= 2 / 127.5, name


@pytest.mark.parametrize("choice", INVERSIONS)
def test_inversion_on_the_device(shell, faces: Path, tmp_path: Path, choice: str) -> None:
    """Images agree with the CPU's, and latents that are written and read back give the same image."""
    settings, bound = INVERSIONS[choice]
    common = [f"ckpt={REFINED}", "num_workers=0", "progress_bar=false"]
    on_cpu = [item for item in settings if item not in ("cuda_graphs=true", "compile=true", "precision=bf16")]
    one = [f"input={faces}", "batch_size=1", "latents=true"]
    assert shell("predict", *common, *on_cpu, *one, "accelerator=cpu", "output=cpu").code == 0
    done = shell("predict", *common, *settings, *one, "accelerator=gpu", "output=gpu")
    assert done.code == 0 and "3 written" in done.out and "could not be captured" not in done.err, done.err
    read = ["input=gpu/latents.safetensors", "output=again", "batch_size=1", "accelerator=gpu"]
    read += [item for item in settings if item == "precision=bf16"]
    done = shell("predict", *common, *read)
    assert done.code == 0, done.err
    for name in ("0.png", "1.png", "2.png"):
        found = pixels(tmp_path / "gpu" / name)
        assert np.abs(found - pixels(tmp_path / "cpu" / name)).mean() <= bound, name
        assert np.abs(found - pixels(tmp_path / "again" / name)).max() <= 1, name


def test_evaluation_on_the_device(shell, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "gpu"):
        done = shell(
            "evaluate", f"ckpt={REFINED}", "data.limit=8", "metric=[psnr,ssim]", "images=0", "progress_bar=false",
            f"accelerator={device}", f"output={device}",
        )  # fmt: skip
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / device / "metrics.json").read_text())["metrics"])
    cpu, gpu = found
    assert gpu["psnr"]["mean"] == pytest.approx(cpu["psnr"]["mean"], abs=0.05)
    assert gpu["ssim"]["mean"] == pytest.approx(cpu["ssim"]["mean"], abs=1e-3)


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_on_the_device(kind: str, precision: str, shell, tiny: list[str], tmp_path: Path) -> None:
    """Only what is trained changes. In float16, the scale of the loss falls until no gradient is infinite."""
    settings = [*TRAININGS[kind], *("trainer=gpu" if item == "trainer=cpu" else item for item in tiny)]
    done = shell("train", *settings, f"trainer.precision={precision}", "run=r")
    assert done.code == 0, done.err
    checkpoint = tmp_path / "runs" / "inversion" / "r" / "checkpoints" / "last.ckpt"
    before = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    steps = 16 if precision == "16-mixed" else 4
    done = shell("train", "resume=runs/inversion/r", f"trainer.max_steps={steps}")
    assert done.code == 0, done.err
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    assert state["global_step"] == steps
    after = state["state_dict"]
    assert all(value.isfinite().all() for value in after.values())
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    trained = "net.refiner." if kind == "refiner" else "net.encoder."
    assert any(key.endswith("weight") for key in changed) and all(key.startswith(trained) for key in changed), changed


# float64, because float32 rounding is amplified; plain SGD with lr 1, so that weights change by exactly the gradient
SYNC = ["--config-dir=own", "optimizer=sgd", "trainer.max_steps=1", "trainer.val_every=1", "trainer.precision=64-true"]
SYNC += ["loss=[l2]", "model.noise=const", "trainer=gpu"]
SGD = "_target_: torch.optim.SGD\n_partial_: true\nlr: 1.0\n"
# NCCL refuses two ranks on one GPU; gloo copies the tensors through the host, and is not bound to a device
GLOO = """
import torch
begin = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda _, **options: begin("gloo", **options | {"device_id": None})
"""


def changes(before: Path, after: Path) -> dict[str, torch.Tensor]:
    """Return how a run changed the encoder's weights and statistics."""
    first, last = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
        for run in (before, after)
    )
    return {key: last[key] - first[key] for key in first if key.startswith("net.encoder.")}


@pytest.mark.parametrize("policy", ["sync", "machine", "local"])
@pytest.mark.parametrize("devices", [1, 2])
def test_sync_batch_norm_trains_as_one_device(
    shell, start, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, devices: int
) -> None:
    """Two ranks on two GPUs, or on one GPU as two machines: SyncBatchNorm gives the gradients of one rank."""
    if devices > torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "sgd.yaml").write_text(SGD)
    (tmp_path / "my_gloo.py").write_text(GLOO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    settings = [*(item for item in tiny if item != "trainer=cpu"), *SYNC, f"model.batch_norm={policy}"]
    for run, more in (("before", ["optimizer.lr=0", "model.batch_norm=frozen"]), ("one", ["data.batch_size=4"])):
        done = shell("train", *settings, *more, f"run={run}")
        assert done.code == 0, done.err
    two = [*settings, "run=two", "trainer.strategy=ddp"]
    if devices == 2:
        done = shell("train", *two, "trainer.devices=2")
        assert done.code == 0, done.err
    else:
        succeed(start("torchrun", "train", *two, "plugins=[my_gloo]", "trainer.num_nodes=2"))
    runs = tmp_path / "runs" / "inversion"
    expected, found = (changes(runs / "before", runs / run) for run in ("one", "two"))
    errors = {key: relative_error(found[key], value, 1e-12) for key, value in expected.items()}
    shared = policy == "sync" or (policy, devices) == ("machine", 2)
    assert any("running_var" in key for key in errors) and any("weight" in key for key in errors)
    if shared:
        assert max(errors.values()) <= 1e-7, max(errors, key=errors.__getitem__)
    else:  # the statistics of two images instead of four
        assert max(errors.values()) > 1e-3

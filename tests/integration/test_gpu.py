"""Tests that need a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_generator_and_encoder_agree_with_the_cpu() -> None:
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.psp import PSP
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator(64, style_dim=64, n_mapping=2, max_channels=64)
    net = PSP(GradualStyleEncoder(10, 64, 3, 64, blocks=(1, 1, 1, 1), width=16), generator).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        found = net.cuda()(x.cuda()).cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_on_the_device(precision: str, shell, tiny: list[str], tmp_path: Path) -> None:
    settings = ["trainer=gpu" if item == "trainer=cpu" else item for item in tiny]
    done = shell("train", *settings, f"trainer.precision={precision}", "run=r")
    assert done.code == 0, done.err
    done = shell("train", "resume=auto", "run=r", "trainer.max_steps=4")
    assert done.code == 0, done.err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_sync_batch_norm_has_the_same_statistics_as_one_device(shell, tiny: list[str], tmp_path: Path) -> None:
    settings = [item for item in tiny if item != "trainer=cpu"] + ["trainer.max_steps=1", "trainer.val_every=1"]
    for run, more in (("one", ["trainer=gpu", "data.batch_size=4"]), ("two", ["trainer=ddp", "trainer.devices=2"])):
        done = shell("train", *settings, *more, "model.noise=const", f"run={run}")
        assert done.code == 0, done.err
    one, two = (
        torch.load(tmp_path / "runs" / "inversion" / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    for key in (key for key in one if key.endswith("running_mean")):
        assert torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-5), key

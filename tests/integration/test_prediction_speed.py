"""psp-predict's speed settings: their outputs agree with the plain network within stated bounds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from psp_lightning._conf import config_root
from psp_lightning.build.prediction_settings import check_settings
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import keep_freed_memory

pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small network and three pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("speed")
    generator = Generator.seeded(0, output_size=32, style_dim=32, n_mapping=2, max_channels=16)
    encoder = GradualStyleEncoder(generator.n_styles, 32, 3, 32, blocks=(1, 1, 1, 1), width=8)
    net = PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": 32})
    torch.save({"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}},
               folder / "n.ckpt")  # fmt: skip
    (folder / "in").mkdir()
    for i in range(3):
        array = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "in" / f"{i}.png")
    return folder


def written(psp, inputs: Path, output: Path, *settings: str) -> np.ndarray:
    done = psp("predict", f"ckpt={inputs / 'n.ckpt'}", f"input={inputs / 'in'}", f"output={output}", "batch_size=2",
               "num_workers=0", "progress_bar=false", "accelerator=cpu", *settings)  # fmt: skip
    assert done.code == 0, done.err
    return np.stack([np.asarray(Image.open(path), np.int16) for path in sorted(output.glob("*.png"))])


def test_fast_paths_write_the_same_pictures(psp, inputs: Path, tmp_path: Path) -> None:
    plain = written(psp, inputs, tmp_path / "plain", "fuse=false")
    assert len(plain) == 3
    fused = np.abs(written(psp, inputs, tmp_path / "fused") - plain)
    assert fused.max() <= 1 and fused.mean() < 0.01, "float32 may differ by one level, from rounding"
    half = np.abs(written(psp, inputs, tmp_path / "half", "precision=bf16") - plain)
    assert half.mean() < 2 and half.max() < 24, (half.mean(), half.max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16", "fuse": False}, "bf16-mixed"),
        ({"cuda_graphs": True, "accelerator": "cpu"}, "CUDA device"),
        ({"compile": True}, "C[+][+] compiler"),
    ],
)
def test_incompatible_settings(settings, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with initialize_config_dir(config_root(), version_base="1.3"):
        plain = compose("predict", ["ckpt=none", "input=none", "output=none"])
    check_settings(plain)
    with pytest.raises(UserError, match=message):
        check_settings(OmegaConf.merge(plain, settings))


def test_freed_memory_is_kept_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSP_KEEP_MEMORY", "0")
    assert not keep_freed_memory()
    monkeypatch.delenv("PSP_KEEP_MEMORY")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_whatever_its_size() -> None:
    """Blocks above 2 GiB are kept too: a training step at 1024 px frees such blocks. The memory is not touched here."""
    program = (
        "import ctypes, re\n"
        "from pathlib import Path\n"
        "from psp_lightning.utils.memory import keep_freed_memory\n"
        "assert keep_freed_memory()\n"
        "library = ctypes.CDLL(None)\n"
        "library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "library.free.argtypes = [ctypes.c_void_p]\n"
        "library.free(library.malloc(5 << 30))\n"
        "print(re.search(r'VmData:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PSP_KEEP_MEMORY"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 > 5 << 30, "the freed block was returned to the system"

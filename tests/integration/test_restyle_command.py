"""psp-weights imports a released ReStyle file, and psp-predict uses the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from psp_lightning.latents.files import read_latents
from psp_lightning.models.encoders import ReStyleEncoder
from psp_lightning.models.stylegan2 import Generator


@torch.no_grad()
def test_import_and_predict(psp, tmp_path: Path) -> None:
    decoder = Generator.seeded(0, output_size=64, style_dim=16, n_mapping=2, max_channels=8).eval()
    torch.manual_seed(0)
    encoder = ReStyleEncoder(decoder.n_styles, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4).eval()
    average = torch.randn(16)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    opts = {"encoder_type": "BackboneEncoder", "input_nc": 6, "n_iters_per_batch": 2, "dataset_type": "ffhq_encode"}
    torch.save({"state_dict": state, "latent_avg": average.expand(10, -1), "opts": opts}, tmp_path / "r.pt")
    done = psp("weights", "import", "r.pt", "out=r.safetensors")
    assert done.code == 0 and "ReStyleEncoder, 3 channels of 32 px, 2 passes" in done.out, done.err + done.out

    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    done = psp(
        "predict", "ckpt=r.safetensors", "input=in", "output=out", "latents=true", "accelerator=cpu", "num_workers=0",
        "progress_bar=false",
    )  # fmt: skip
    assert done.code == 0, done.err

    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    codes = average.expand(1, 10, -1)
    for _ in range(2):
        image = F.adaptive_avg_pool2d(decoder.synthesis(codes), 32)
        features = encoder.body(encoder.input_layer(torch.cat([x, image], dim=1)))
        codes = codes + torch.stack([head(features) for head in encoder.styles], dim=1)
    found = read_latents(tmp_path / "out" / "latents.safetensors")
    assert (torch.as_tensor(found.codes) - codes).abs().max() < 1e-4 * codes.abs().max()
    image = decoder.synthesis(codes)[0].clamp(-1, 1).permute(1, 2, 0).numpy() * 127.5 + 127.5
    written = np.asarray(Image.open(tmp_path / "out" / "a.png"), dtype=np.float32)
    assert written.shape == (64, 64, 3) and np.abs(written - image).max() <= 1

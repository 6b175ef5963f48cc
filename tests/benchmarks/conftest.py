"""Small weights for the benchmarks."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write random weights of a small network (32 px generator, 64 px encoder) and of the losses' networks."""
    import torch

    from benchmarks.compare.ours import write_weights
    from benchmarks.compare.rows import FLOAT32, Job
    from psp_lightning import PSP
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator
    from psp_lightning.utils.atomic import save_torch

    folder = tmp_path_factory.mktemp("weights")
    files = {"psp": "psp_32.pt", "alexnet": "alexnet.pth", "ir_se50": "ir_se50.pth"}
    files = {name: str(folder / file) for name, file in files.items()}
    torch.manual_seed(0)
    generator = Generator(32, n_mapping=2, max_channels=16, style_dim=32)
    encoder = GradualStyleEncoder(generator.n_styles, 32, input_size=64, blocks=[1, 1, 1, 1], width=16)
    net = PSP(encoder, generator, torch.randn(32), source={"kind": "rgb", "size": 64})
    content = {"psp": net.describe(), "state_dict": {f"net.{key}": value for key, value in net.state_dict().items()}}
    save_torch(content, files["psp"])
    write_weights(Job("weights", 32, 1, FLOAT32, "cpu", files))
    return files


@pytest.fixture(scope="session")
def overrides() -> list[str]:
    """Return settings of psp-train for the small network."""
    return ["encoder=gradual_small", "domain.input_size=64", "domain.target_size=64", "trainer=cpu"]

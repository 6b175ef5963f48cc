"""`psp_lightning.fit`: training from Python, without a configuration."""

from __future__ import annotations

import csv
import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import psp_lightning
from psp_lightning import PSP, ToyFaces
from psp_lightning.data.datamodules import InversionDataModule
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.losses import L2Loss
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

small = functools.partial(GradualStyleEncoder, blocks=(1, 1, 1, 1), width=8)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(task: str = "inversion", data: Any = None, **arguments: Any) -> PSP:
    generator = Generator.seeded(0, output_size=32, style_dim=32, n_mapping=2, channel_multiplier=1, max_channels=16)
    average = torch.zeros(32)
    defaults = {"run": "run", "losses": {"l2": 1.0}, "generator": (generator, average), "encoder": small}
    defaults |= {"steps": 2, "batch_size": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    return psp_lightning.fit(task, ToyFaces(n=4) if data is None else data, **{**defaults, **arguments})


def test_prediction_reads_the_run_folder(psp, tmp_path: Path) -> None:
    net = fit("sketch2face")
    with torch.no_grad():
        image = net(torch.zeros(1, 1, 32, 32))
    assert image.shape == (1, 3, 32, 32) and not net.training
    rows = list(csv.DictReader((tmp_path / "run/csv/metrics.csv").open()))
    assert {"val/loss", "val/mse", "val/psnr"} <= rows[-1].keys() and rows[-1]["step"] == "2"
    assert (tmp_path / "run/images/val_00000002.png").is_file()
    (tmp_path / "in").mkdir()
    from PIL import Image

    Image.new("L", (40, 40), 255).save(tmp_path / "in/a.png")
    done = psp("predict", "ckpt=run", "input=in", "output=out", "progress_bar=false", "accelerator=cpu")
    assert done.code == 0 and (tmp_path / "out/a.png").is_file() and "in colour" not in done.err, done.err
    Image.new("RGB", (40, 40), (200, 150, 90)).save(tmp_path / "in/a.png")
    Image.new("RGB", (40, 40), (200, 150, 90)).save(tmp_path / "in/b.png")
    with pytest.warns(UserWarning, match="run takes grey pictures, but .*a.png is in colour") as warned:
        psp("predict", "ckpt=run", "input=in", "output=photos", "progress_bar=false", "accelerator=cpu")
    assert sum("in colour" in str(warning.message) for warning in warned) == 1


def test_a_network_without_a_source_is_refused_with_the_remedy(psp, tmp_path: Path) -> None:
    """The remedy of the message is followed to the letter."""
    from PIL import Image

    net = fit()
    net.source = {}
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "psp": net.describe(), "global_step": 1}, tmp_path / "bare.ckpt")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    predict = ("predict", "input=a.png", "output=out", "progress_bar=false", "accelerator=cpu")
    done = psp(*predict, "ckpt=bare.ckpt")
    assert done.code == 1 and "bare.ckpt does not say what its encoder takes" in done.err
    remedy = done.err.split("Add it in Python: ")[1]
    exec(remedy, {"PSP": PSP, "InputSpec": psp_lightning.InputSpec, "psp_lightning": psp_lightning})
    done = psp(*predict, "ckpt=FILE.safetensors")
    assert done.code == 0 and (tmp_path / "out/a.png").is_file(), done.err


def test_targets_larger_than_the_generators_images_are_refused() -> None:
    store = ToyFacesStore(64, n=4)
    with pytest.raises(UserError, match="targets have 64 px, but .* only 32 px"):
        fit("inversion", InversionDataModule(store, store, input_size=32, target_size=64, batch_size=2))


def test_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    fit(run="whole", steps=3)
    fit(run="parts", steps=1)
    with pytest.raises(UserError, match="contains a run already"):
        fit(run="parts", steps=3)
    fit(run="parts", steps=3, resume=True)
    states = [
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "parts")
    ]
    different = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not different, different
    steps = [row["step"] for row in csv.DictReader((tmp_path / "parts/csv/metrics.csv").open())]
    assert steps == ["1", "1", "3", "3"]  # at the end of each part: training, validation


def test_ctrl_c_says_how_to_continue(capfd: pytest.CaptureFixture[str]) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 1:
                signal.raise_signal(signal.SIGINT)

    fit(steps=4, callbacks=[Interrupt()])
    assert "run: stopped at step 2 of 4; the same call with resume=True continues\n" in capfd.readouterr().err
    fit(steps=4, resume=True)
    assert "stopped" not in capfd.readouterr().err


def test_data_from_folders_a_pair_of_folders_and_a_data_module(psp, tmp_path: Path) -> None:
    assert psp("data", "toyfaces", "out=faces", "n=4", "size=32").code == 0
    with pytest.warns(UserWarning, match="'perceptual' compares images with the network of the toy faces"):
        fit("inversion", "faces/CelebA-HQ-img", run="folder", losses={"perceptual": 1.0})
    fit("sketch2face", ("faces/sketch", "faces/CelebA-HQ-img"), run="pair")
    store = ToyFacesStore(32, n=4)
    fit("inversion", InversionDataModule(store, store, input_size=32, target_size=32, batch_size=2), run="module")
    assert all((tmp_path / run / "checkpoints/best.ckpt").is_file() for run in ("folder", "pair", "module"))


def test_custom_parts_and_trainer_options(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self, style_dim: int, in_channels: int, input_size: int) -> None:
            super().__init__()
            self.config = {"style_dim": style_dim, "in_channels": in_channels, "input_size": input_size}
            self.in_channels, self.input_size = in_channels, input_size
            self.linear = nn.Linear(in_channels, style_dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.mean((2, 3)))

    from psp_lightning.models.registry import ENCODERS

    ENCODERS["Tiny"] = Tiny
    seen = []
    try:
        from pytorch_lightning.callbacks import LambdaCallback

        note = LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(trainer.global_step))
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        losses = {"mine": (L2Loss(), 0.5)}
        net = fit(encoder=Tiny, optimizer=optimizer, losses=losses, metrics={}, callbacks=[note], limit_val_batches=1)
    finally:
        del ENCODERS["Tiny"]
    assert type(net.encoder) is Tiny and seen == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "inversoin"}, "Did you mean 'inversion'"),
        ({"losses": {"l3": 1.0}}, "There is no loss 'l3'"),
        ({"losses": {"l2": -1}}, "finite number >= 0"),
        ({"data": "nowhere"}, "nowhere"),
        ({"steps": 0}, "steps=0"),
        ({"resume": True}, "There is no run to continue"),
        ({"precisoin": "32-true"}, "precisoin"),
        ({"max_steps": 3}, "fit takes steps= instead"),
        ({"val_check_interval": 3}, "fit takes val_every= instead"),
        ({"generator": "nowhere.pt"}, "nowhere.pt"),
        ({"losses": {"mine": L2Loss()}}, "'mine' has no weight. Write .'mine': .L2Loss"),
        ({"losses": ["l2"]}, "must be a dict: name to weight"),
        ({"encoder": "tiny"}, "encoder must be a class or a function .*, not 'tiny'"),
        ({"encoder": small(style_dim=32, n_styles=8, input_size=32)}, "not an instance of GradualStyleEncoder"),
        ({"encoder": lambda size: None}, "it is called with style_dim, in_channels, input_size: "),
        ({"optimizer": "adam"}, "optimizer='adam' must be a function"),
    ],
)
def test_a_mistake_is_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(**arguments)
    assert not (tmp_path / "run/checkpoints").exists()

"""Parts of build/ that the tests of the commands do not reach."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.build.trainer import FIXED, build_callbacks, build_loggers, prepare
from psp_lightning.build.training import (
    build_data,
    build_metrics,
    build_module,
    build_training,
    load_backbone,
    toy_terms,
)
from psp_lightning.losses import CompositeLoss, L2Loss
from psp_lightning.models.encoders import EncoderIntoW
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.utils.errors import UserError
from tests.config.test_catalogue import composed


@pytest.mark.parametrize("channels", [3, 19])
def test_backbone_is_initialised_from_the_face_network(channels: int, tmp_path: Path) -> None:
    state = ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict()
    torch.save(state, tmp_path / "id.pth")
    encoder = EncoderIntoW(512, channels, 32)
    first = {key: value.clone() for key, value in encoder.state_dict().items() if key.startswith("input_layer.")}
    load_backbone(encoder, str(tmp_path / "id.pth"))
    loaded = encoder.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded if key.startswith("body."))
    expected = state if channels == 3 else first  # with other channels, the first layer keeps its own weights
    assert all(torch.equal(loaded[key], expected[key]) for key in first)


def test_backbone_of_another_network_is_refused(tmp_path: Path) -> None:
    state = ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("input_layer.")}, tmp_path / "id.pth")
    with pytest.raises(UserError, match="input_layer"):
        load_backbone(EncoderIntoW(512, 3, 32), str(tmp_path / "id.pth"))


def test_options_of_the_trainer_that_other_settings_determine() -> None:
    """Lightning would report several values, or the setting would silently win."""
    with initialize_config_dir(config_root(), version_base="1.3"):
        for key in ("max_epochs", "val_check_interval", "check_val_every_n_epoch", "logger", "callbacks"):
            cfg = compose("train", [f"+trainer.{key}=1"])
            with pytest.raises(UserError, match=rf"^trainer\.{key} cannot be set: .*(trainer\.|logger|callbacks)"):
                prepare(cfg)
        with pytest.raises(UserError, match=r"^trainer\.sync_batchnorm cannot be set: model\.batch_norm sets it"):
            prepare(compose("train", ["+trainer.sync_batchnorm=false"]))
    assert FIXED.keys() <= inspect.signature(pl.Trainer).parameters.keys()


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ([], []),
        (["data=folder"], []),  # the shipped generator
        (["generator=file", "generator.path=g.pt"], []),  # toy faces, for example with a generator trained on them
        (["data=folder", "generator=file", "generator.path=g.pt"], ["perceptual", "id"]),
        (["data=folder", "generator=file", "generator.path=g.pt", "domain.identity=mine.safetensors"], []),
        (["data=folder", "generator=seeded", "loss=[l2,id]"], ["id"]),
    ],
)
def test_the_toy_faces_network_for_other_images_is_noticed(settings: list[str], terms: list[str]) -> None:
    with initialize_config_dir(config_root(), version_base="1.3"):
        assert toy_terms(compose("train", settings)) == terms


@pytest.mark.parametrize(("width", "last"), [(4, False), (8, True)])
def test_narrow_encoders_are_not_trained_in_channels_last(width: int, last: bool) -> None:
    """With few channels, oneDNN's gradient of a strided 1x1 convolution writes out of bounds in that memory format."""
    settings = ["generator=seeded", "generator.max_channels=16", f"encoder.width={width}", "loss=[l2]",
                "data.train.n=2", "data.val.n=1", "model.latent_avg_samples=16", "paths.output_dir=."]  # fmt: skip
    with initialize_config_dir(config_root(), version_base="1.3"):
        cfg = compose("train", settings)
    convolution = build_module(cfg, build_data(cfg)).net.encoder.input_layer[0].weight
    assert convolution.shape[0] == width
    assert convolution.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize(("group", "base"), [("logger", "Logger"), ("callbacks", "Callback")])
def test_a_logger_or_callback_of_another_class(group: str, base: str) -> None:
    cfg = OmegaConf.create({group: {"mine": {"_target_": "builtins.dict"}, "none": None}})
    with pytest.raises(UserError, match=rf"{group}\.mine: builtins\.dict must derive from .*\.{base}\."):
        build_loggers(cfg, None) if group == "logger" else build_callbacks(cfg, [])


def test_a_metric_with_the_network_of_a_loss_that_measures_no_similarity() -> None:
    cfg = OmegaConf.create({"metric": {"mine": {"_target_": "builtins.dict", "loss": "l2"}}})
    losses = CompositeLoss({"l2": L2Loss()}, {"l2": 1.0})
    with pytest.raises(UserError, match=r"metric\.mine\.loss=l2: the loss 'l2' does not measure a similarity"):
        build_metrics(cfg, losses)


def test_a_metric_whose_loss_is_not_selected_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    cfg = OmegaConf.create({"metric": {"mine": {"_target_": "builtins.dict", "loss": "idd"}}})
    with caplog.at_level("INFO"):
        assert build_metrics(cfg, CompositeLoss({"l2": L2Loss()}, {"l2": 1.0})) == {}
    assert "not measuring mine: it uses the loss 'idd', which is not in loss=[...]" in caplog.text


@pytest.mark.parametrize("experiment", ["toyfaces_inversion", "toyfaces_e4e"])
def test_the_options_of_ddp(experiment: str, tmp_path: Path) -> None:
    """Gradients are views of the exchanged buffers; only e4e, whose first stages skip heads, looks for unused ones."""
    cfg = composed(f"experiment={experiment}", "trainer=ddp_cpu", "logger=none", f"paths.output_dir={tmp_path}")
    strategy: Any = build_training(cfg, None).trainer.strategy
    assert strategy._ddp_kwargs == {
        "broadcast_buffers": False, "gradient_as_bucket_view": True,
        "find_unused_parameters": experiment == "toyfaces_e4e",
    }  # fmt: skip

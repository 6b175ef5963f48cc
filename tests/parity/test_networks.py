"""Networks against the reference's values (pSp, commit 5cfff38, CPU float32), within 1e-4 of the largest magnitude."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.encoders import EncoderIntoW, EncoderIntoWPlus, GradualStyleEncoder
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "reference_state_dicts.json").read_text())


def assert_close(name, actual, expected, tolerance=1e-4):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, reference {expected.shape}"
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def normal(golden, name, *shape):
    return torch.from_numpy(golden.normal(name, *shape))


@pytest.fixture(scope="module")
def generator(golden):
    net = Generator(32).eval()
    net.load_state_dict(golden.state_dict(SHAPES["generator"]["32"], "decoder."))
    return net


@pytest.mark.parametrize("size", [32, 256, 1024])
def test_generator_keys(size):
    with torch.device("meta"):
        net = Generator(size)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == SHAPES["generator"][str(size)]


@pytest.mark.parametrize("name, depth, mode", [("ir_se50", 50, "ir_se"), ("curricularface_ir101", 100, "ir")])
def test_face_embedder_keys(name, depth, mode):
    with torch.device("meta"):
        net = ArcFaceIRSE(depth, mode)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == SHAPES[name]


@torch.no_grad()
def test_generator(golden, reference, generator):
    image = generator.synthesis(normal(golden, "generator.w", 2, 8, 512))
    assert_close("generator.image", image, reference["generator.image"])


@torch.no_grad()
def test_mapping(golden, reference, generator):
    assert_close("mapping.w", generator.mapping(normal(golden, "mapping.z", 4, 512)), reference["mapping.w"])


@torch.no_grad()
def test_truncation(golden, reference, generator):
    z, latent = normal(golden, "truncation.z", 2, 512), normal(golden, "truncation.latent", 512) * 0.5
    w = generator.truncate(generator.mapping(z), latent, 0.7)
    assert_close("truncation.w", w, reference["truncation.w"])
    assert_close("truncation.image", generator.synthesis(w), reference["truncation.image"])
    assert_close("truncation.image", generator(z, psi=0.7, latent=latent), reference["truncation.image"])


@torch.no_grad()
def test_generator_big(golden, reference):
    net = Generator(256).eval()
    net.load_state_dict(golden.state_dict(SHAPES["generator"]["256"], "decoder."))
    image = net.synthesis(normal(golden, "generator_big.w", 1, 14, 512))
    assert_close("generator_big", image[:, :, ::16, ::16], reference["generator_big.image_stride16"])
    assert_close("mean, std", torch.stack([image.mean(), image.std()]), reference["generator_big.mean_std"])


def gradual(golden, channels):
    net = GradualStyleEncoder(8, in_channels=channels)
    shapes = dict(SHAPES["encoder"]["GradualStyleEncoder/n_styles=8/input_nc=3"])
    shapes["input_layer.0.weight"] = [64, channels, 3, 3]
    net.load_state_dict(golden.state_dict(shapes, "encoder."))
    return net


@pytest.mark.parametrize("channels", [1, 3, 19])
@torch.no_grad()
def test_gradual_encoder(golden, reference, channels):
    name = f"encoder_gradual_nc{channels}"
    x = normal(golden, f"{name}.x", 1, channels, 256, 256).clamp(-1, 1)
    assert_close(name, gradual(golden, channels).eval()(x), reference[f"{name}.codes"])


@torch.no_grad()
def test_gradual_encoder_in_training_mode(golden, reference):
    net = gradual(golden, 3).train()
    x = normal(golden, "encoder_gradual_train.x", 2, 3, 256, 256).clamp(-1, 1)
    assert_close("codes", net(x), reference["encoder_gradual_train.codes"])
    assert_close("running mean", net.input_layer[1].running_mean, reference["encoder_gradual_train.running_mean"])


@pytest.mark.parametrize(
    "name, build",
    [
        ("BackboneEncoderUsingLastLayerIntoW", lambda: EncoderIntoW()),
        ("BackboneEncoderUsingLastLayerIntoWPlus", lambda: EncoderIntoWPlus(8)),
    ],
)
@torch.no_grad()
def test_backbone_encoders(golden, reference, name, build):
    net = build().eval()
    shapes = next(v for k, v in SHAPES["encoder"].items() if k.split("/")[0] == name)
    net.load_state_dict(golden.state_dict(shapes, "encoder."))
    x = normal(golden, f"{name}.x", 1, 3, 256, 256).clamp(-1, 1)
    assert_close(name, net(x), reference[f"{name}.codes"])


@pytest.fixture(scope="module")
def released(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "p.pt"
    torch.save(golden.psp_checkpoint(), path)
    return path


@torch.no_grad()
def test_psp(golden, reference, released):
    net = PSP.from_checkpoint(released)
    assert not net.training
    x = normal(golden, "psp.x", 2, 3, 256, 256).clamp(-1, 1)
    w_plus = net.encode(x)
    image = net.decode(w_plus)
    assert_close("psp.latents", w_plus, reference["psp.latents"])
    assert_close("psp.image", image, reference["psp.image"])
    resized = torch.nn.functional.adaptive_avg_pool2d(image, 256)[:, :, ::4, ::4]
    assert_close("psp.image_resized", resized, reference["psp.image_resized_stride4"])

    inject = net.generator.mapping(normal(golden, "psp_mix.z", 1, 512))
    assert_close("psp_mix.inject", inject, reference["psp_mix.inject"])
    first, mask = w_plus[:1], range(3, 8)
    assert_close("mix", net.decode(net.mix_styles(first, inject, mask)), reference["psp_mix.image"])
    assert_close("0.6", net.decode(net.mix_styles(first, inject, mask, 0.6)), reference["psp_mix.image_alpha0.6"])
    assert_close("zero", net.decode(net.mix_styles(first, None, [5])), reference["psp_mix.image_mask_zero"])


@torch.no_grad()
def test_psp_into_w(golden, reference, tmp_path):
    torch.save(golden.psp_checkpoint("BackboneEncoderUsingLastLayerIntoW"), tmp_path / "p.pt")
    net = load_psp(tmp_path / "p.pt")
    x = normal(golden, "psp.x", 2, 3, 256, 256).clamp(-1, 1)[:1]
    assert_close("psp_w.image", net.decode(net.encode(x)), reference["psp_w.image"])


@torch.no_grad()
def test_generator_file(golden, reference, tmp_path, released):
    torch.save(golden.generator_checkpoint(), tmp_path / "g.pt")
    for path in (tmp_path / "g.pt", released):
        net, latent_avg = load_generator(path)
        image = net.synthesis(normal(golden, "generator.w", 2, 8, 512))
        assert_close("generator.image", image, reference["generator.image"])
        assert latent_avg is not None and latent_avg.shape[-1] == 512

"""Importing weights: every size and layout is imported unchanged, hostile and unsupported files are rejected."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from psp_lightning import PSP
from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.safetensors_io import read_described
from psp_lightning.checkpoints.strict import WeightsMismatch, adapt_channels, load_strict
from psp_lightning.checkpoints.weight_files import save_generator, save_psp
from psp_lightning.importers import published as convert
from psp_lightning.importers.imports import import_file
from psp_lightning.importers.parity import parity
from psp_lightning.importers.report import channel_table
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.encoders import Encoder4Editing, EncoderIntoW, GradualStyleEncoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src" / "psp_lightning"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvidia, hostile = load("nvidia_pickles"), load("hostile_files")


def generator(seed: int = 0, **config) -> Generator:
    """Return an untrained generator whose noise and biases have an effect."""
    config = {"output_size": 32, "style_dim": 16, "n_mapping": 2, "max_channels": 8} | config
    net = Generator.seeded(seed, **config).eval()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith((".noise.weight", ".bias")):
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return net


def psp(cls=GradualStyleEncoder, seed: int = 0, **arguments) -> PSP:
    net = generator(seed)
    torch.manual_seed(seed)
    arguments = {"style_dim": 16, "input_size": 32, "blocks": (1, 1, 1, 1), "width": 4} | arguments
    styles = {} if cls is EncoderIntoW else {"n_styles": net.n_styles}
    return PSP(cls(**styles, **arguments), net, torch.randn(16), source={"kind": "rgb", "size": 32}).eval()


def released(net: PSP, encoder_type: str = "GradualStyleEncoder", **opts) -> dict:
    """Return a checkpoint in the layout of pSp's, e4e's and ReStyle's files."""
    state = {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in net.generator.state_dict().items()}
    opts = {"encoder_type": encoder_type, "start_from_latent_avg": True, "dataset_type": "ffhq_encode"} | opts
    return {"state_dict": state, "latent_avg": net.latent_avg.clone(), "opts": opts}


def saved(content, path: Path, **options) -> Path:
    torch.save(content, path, **options)
    return path


# --- round trips ---------------------------------------------------------------------------------------------------

SIZES = itertools.product((32, 64, 256), (1, 2), (2, 8), (1, 3), (128, 512))
# alternately, w has the length of z or the other length
GRID = [(*case, case[4] if sum(case[:4]) // 2 % 2 else 640 - case[4]) for case in SIZES]


def test_the_grid_has_every_pair_of_values():
    for a, b in itertools.combinations(range(6), 2):
        pairs = {(case[a], case[b]) for case in GRID}
        assert len(pairs) == len({case[a] for case in GRID}) * len({case[b] for case in GRID}), (a, b)


@pytest.mark.parametrize(("size", "multiplier", "depth", "image_channels", "z_dim", "w_dim"), GRID)
@torch.no_grad()
def test_round_trips(tmp_path, size, multiplier, depth, image_channels, z_dim, w_dim):
    net = generator(
        output_size=size, channel_multiplier=multiplier, n_mapping=depth, image_channels=image_channels, z_dim=z_dim,
        style_dim=w_dim, max_channels=24, channel_base=4 * size,
    )  # fmt: skip
    average = torch.randn(w_dim, generator=torch.Generator().manual_seed(1))
    state = net.state_dict()
    content = nvidia.snapshot(nvidia.network(nvidia.from_published(state, average)))
    files = {
        "NVIDIA StyleGAN2 pickle": nvidia.write(tmp_path / "n.pkl", content),
        "StyleGAN2 checkpoint, g_ema": saved({"g_ema": state, "latent_avg": average}, tmp_path / "r.pt"),
    }
    z = torch.randn(1, z_dim, generator=torch.Generator().manual_seed(2))
    w, image = net.mapping(z), net(z)
    for source, file in files.items():
        found = import_file(file)
        assert source in found.source
        found.save(tmp_path / "out.safetensors")
        again, stored = load_generator(tmp_path / "out.safetensors")
        assert torch.equal(stored, average), source
        shape = (again.output_size, again.config["n_mapping"], again.config["image_channels"], again.z_dim)
        assert (*shape, again.style_dim) == (size, depth, image_channels, z_dim, w_dim), source
        assert channel_table(again) == channel_table(net)
        assert channel_table(again)[size] == 4 * multiplier
        assert (again.mapping(z) - w).abs().max() < 1e-5 and (again(z) - image).abs().max() < 1e-5, source


@torch.no_grad()
def test_channels_without_a_rule(tmp_path):
    net = generator(channels=[6, 10, 7, 3])
    file = nvidia.write(tmp_path / "n.pkl", nvidia.network(nvidia.from_published(net.state_dict(), torch.zeros(16))))
    found = import_file(file)
    found.save(tmp_path / "out.safetensors")
    again, _ = load_generator(tmp_path / "out.safetensors")
    z = torch.randn(2, 16)
    assert torch.allclose(again(z), net(z), atol=1e-5) and "(no rule)" in dict(found.summary())["channels"]


# --- other layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_rosinality(tmp_path, legacy):
    net = generator()
    state = net.state_dict()
    training = {
        "g": generator(1).state_dict(), "d": {"convs.0.0.weight": torch.ones(2)}, "g_ema": state,
        "g_optim": {"state": {}}, "args": argparse.Namespace(size=32), "ada_aug_p": 0.1,
    }  # fmt: skip
    options = {"_use_new_zipfile_serialization": not legacy}
    found = import_file(saved(training, tmp_path / "t.pt", **options))
    assert torch.equal(found.generator.input.input, state["input.input"]), "the averaged weights must be imported"
    assert found.latent_avg is None and found.average.endswith("(the file has none)")
    assert {row[0] for row in found.rows if row[2].startswith("not used")} >= {"g", "d", "g_optim"}
    found.save(tmp_path / "o.safetensors", {"licence": "mine"})
    description, tensors = read_described(tmp_path / "o.safetensors", "generator")
    assert torch.equal(tensors["latent_avg"], net.latent_average(100_000, 0)), "the mean of 100,000 draws, seed 0"
    assert "100000 mapped draws, seed 0" in description["latent_avg"]
    origin = description["origin"]
    assert origin["file"] == "t.pt" and origin["licence"] == "mine" and len(origin["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(description), "the file must not contain a path of this machine"

    last = import_file(saved({"g": state}, tmp_path / "g.pt", **options))
    assert any("no g_ema" in note for note in last.notes)
    early = {key: value for key, value in state.items() if not key.startswith("noises.")}
    found = import_file(saved({"g_ema": early}, tmp_path / "e.pt", **options))
    again = import_file(tmp_path / "e.pt")
    assert any("drawn with seed 0" in note for note in found.notes)
    assert torch.equal(found.generator.noises.noise_3, again.generator.noises.noise_3)


@torch.no_grad()
def test_computed_average(tmp_path):
    net = generator()
    file = saved({"g_ema": net.state_dict(), "latent_avg": torch.ones(16)}, tmp_path / "g.pt")
    assert torch.equal(import_file(file).latent_avg, torch.ones(16))
    assert import_file(file, average="computed").latent_avg is None
    per_style = torch.randn(8, 16)
    file = saved({"g_ema": net.state_dict(), "latent_avg": per_style}, tmp_path / "g.pt")
    assert torch.equal(import_file(file).latent_avg, per_style)
    for wrong, message in ((torch.ones(15), "does not fit 8 styles of 16"), (torch.full((16,), torch.inf), "finite")):
        with pytest.raises(UserError, match=f"{message}.*latent_avg=computed"):
            import_file(saved({"g_ema": net.state_dict(), "latent_avg": wrong}, tmp_path / "g.pt"))


@pytest.mark.parametrize(
    ("cls", "encoder_type"),
    [
        (GradualStyleEncoder, "GradualStyleEncoder"),
        (Encoder4Editing, "Encoder4Editing"),
        (EncoderIntoW, "SingleStyleCodeEncoder"),
        (EncoderIntoW, "BackboneEncoderUsingLastLayerIntoW"),
    ],
)
@torch.no_grad()
def test_released_networks(tmp_path, cls, encoder_type):
    net = psp(cls)
    found = import_file(saved(released(net, encoder_type), tmp_path / "p.pt"))
    assert found.kind == "psp" and all(result == "matched" for _, _, result in found.rows), found.rows
    found.save(tmp_path / "o.safetensors")
    again = load_psp(tmp_path / "o.safetensors")
    assert type(again.encoder) is cls
    if cls is not EncoderIntoW:
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again.encode(x), net.encode(x)) and torch.equal(again(x), net(x))
        assert torch.equal(load_psp(tmp_path / "p.pt")(x), net(x))
    alone = import_file(tmp_path / "p.pt", what="generator")
    assert alone.kind == "generator" and torch.equal(alone.latent_avg, net.latent_avg[0])
    assert ("encoder", len(net.encoder.state_dict()), "not used: what=generator") in alone.rows


@torch.no_grad()
def test_e4e_adds_its_differences_to_the_first_style():
    """By definition, the codes are w_0 everywhere, plus the difference of each further head."""
    net = psp(Encoder4Editing)
    plain = GradualStyleEncoder(**net.encoder.config).eval()
    plain.load_state_dict(net.encoder.state_dict())
    x = torch.randn(2, 3, 32, 32)
    heads, codes = plain(x), net.encoder(x)
    for i in range(8):
        assert torch.allclose(codes[:, i], heads[:, 0] + (heads[:, i] if i else 0), atol=1e-6), i


@pytest.mark.parametrize(
    ("encoder_type", "opts", "change", "reason"),
    [
        ("BackboneEncoder", {"dataset_type": "cars_encode"}, None, "256x192"),
        ("GradualStyleEncoder", {"n_iters_per_batch": 5}, None, "encoder is pSp's"),
        ("ResNetBackboneEncoder", {}, "conv1.weight", "ResNet-34"),
        ("ResNetProgressiveBackboneEncoder", {}, None, "ResNet-34"),
        ("", {}, "latlayer", "do not say which encoder"),
    ],
)
def test_the_generator_of_other_restyle_networks_is_imported(tmp_path, encoder_type, opts, change, reason):
    net = psp()
    content = released(net, encoder_type, **opts)
    if change == "latlayer":
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "latlayer" not in k}
    elif change:
        content["state_dict"][f"encoder.{change}"] = torch.ones(1)
    found = import_file(saved(content, tmp_path / "p.pt"))
    assert found.kind == "generator" and torch.equal(found.latent_avg, net.latent_avg[0])
    assert "only its generator" in found.notes[0] and reason in found.notes[0]
    assert any("unsupported encoder" in result for _, _, result in found.rows) and "ReStyle" in found.source
    with pytest.raises(UserError, match=f"ReStyle checkpoint.*{reason}.*psp-weights import"):
        load_psp(tmp_path / "p.pt")


@torch.no_grad()
def test_our_own_files(tmp_path):
    net = psp()
    save_psp(tmp_path / "p.safetensors", net, {"training": "x", "licence": "MIT"})
    save_generator(tmp_path / "g.safetensors", net.generator, {"licence": "MIT"})
    checkpoint = {"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saved(checkpoint, run / "checkpoints" / "best.ckpt")
    x = torch.randn(1, 3, 32, 32)
    for path in (tmp_path / "p.safetensors", run, run / "checkpoints" / "best.ckpt"):
        found = import_file(path)
        assert torch.equal(found.net(x), net(x)) and found.kind == "psp"
    found = import_file(tmp_path / "g.safetensors")
    assert found.facts["licence"] == "MIT" and "100000 mapped draws" in found.average
    trained = tmp_path / "trained"
    trained.mkdir()
    (tmp_path / "g.safetensors").rename(trained / "generator.safetensors")
    assert import_file(trained).kind == "generator", "the run folder of psp-train-generator"
    assert import_file("toyfaces/generator").generator.output_size == 64


@torch.no_grad()
def test_states_inside_other_files(tmp_path):
    """Lightning and safetensors files of other projects may contain a generator under a prefix."""
    net = generator()
    state = net.state_dict()
    lightning = {
        "pytorch-lightning_version": "2.0", "global_step": 1,
        "state_dict": {f"G_ema.{k}": v for k, v in state.items()}
        | {f"G.{k}": v + 1 for k, v in state.items()} | {"D.weight": torch.ones(2)},
    }  # fmt: skip
    found = import_file(saved(lightning, tmp_path / "l.ckpt"))
    assert torch.equal(found.generator.input.input, state["input.input"]) and "G_ema.*" in found.source
    assert any(part == "other keys" and "not used" in text for part, _, text in found.rows)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "s.safetensors")
    assert torch.equal(import_file(tmp_path / "s.safetensors").generator.input.input, state["input.input"])


# --- strict loading ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_numbers_of_input_channels(tmp_path):
    net = psp()
    file = saved(released(net), tmp_path / "p.pt")
    x = torch.rand(1, 3, 32, 32)
    more = import_file(file, in_channels=5)
    assert ("encoder.input_layer", 1, "adapted: its input channels") in more.rows
    wide = torch.cat([x, torch.rand(1, 2, 32, 32)], 1)
    assert torch.allclose(more.net.encode(wide), net.encode(x), atol=1e-5), "new channels must start at zero"
    assert more.net.source == {"kind": "labels", "size": 32, "n_classes": 5, "interpolation": "nearest"}
    grey = import_file(file, in_channels=1)
    assert torch.allclose(grey.net.encode(x[:, :1]), net.encode(x[:, :1].expand(-1, 3, -1, -1)), atol=1e-4)
    more.save(tmp_path / "o.safetensors")
    assert load_psp(tmp_path / "o.safetensors").encoder.in_channels == 5
    with pytest.raises(UserError, match="in_channels=4 is for encoders"):
        import_file(file, in_channels=4, what="generator")
    weight = torch.randn(4, 3, 3, 3)
    assert adapt_channels(weight, 2).shape == (4, 2, 3, 3) and torch.equal(adapt_channels(weight, 3), weight)


def test_reports_list_what_was_matched_adapted_and_refused():
    module = torch.nn.Sequential(torch.nn.Conv2d(5, 2, 1), torch.nn.Conv2d(2, 2, 1))
    state = dict(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(2, 2, 1)).state_dict())
    report = load_strict(module, state, adapt=["0.weight"])
    assert report.adapted == ("0.weight",) and report.loaded == 4 and "adapted (0.weight)" in str(report)
    assert ("0", 1, "adapted") in report.rows() and ("1", 2, "matched") in report.rows()
    for pattern, wrong in (("1.weight", state), ("0.weight", state | {"0.weight": torch.ones(4, 3, 1, 1)})):
        with pytest.raises(WeightsMismatch, match="1 of another shape: 0.weight") as error:
            load_strict(module, wrong, adapt=[pattern])
        assert error.value.report.refused == ("0.weight",)
    del state["1.bias"]
    with pytest.raises(WeightsMismatch, match="1 missing: 1.bias"):
        load_strict(module, state, adapt=["0.weight"])
    allowed = load_strict(module, state, ["1.bias"], adapt=["0.weight"])
    assert ("1", 1, "left as it was") in allowed.rows()


def test_mismatches_are_rejected_with_their_report(tmp_path):
    state = generator().state_dict()
    del state["convs.1.activate.bias"]
    state["more"] = torch.ones(1)
    with pytest.raises(WeightsMismatch, match=r"1 missing: convs\.1\.activate\.bias; 1 unexpected: more") as error:
        import_file(saved({"g_ema": state}, tmp_path / "g.pt"))
    assert set(error.value.report.refused) == {"convs.1.activate.bias", "more"}


# --- proof of an import --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parity(tmp_path):
    net = psp()
    file = saved(released(net), tmp_path / "p.pt")
    g = net.generator
    draws = np.random.RandomState(3)
    z, w = draws.randn(2, 16), draws.randn(2, 16)
    as_tensor = {k: torch.tensor(v, dtype=torch.float32) for k, v in {"z": z, "w": w}.items()}
    mapped = g.mapping(as_tensor["z"])
    cut = g.truncate(mapped[:, None], net.latent_avg, 0.5)
    pixels = (g.synthesis(mapped) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    silent = [torch.zeros(1, 1, side, side) for side in g.noise_sides()]
    x = torch.rand(1, 3, 32, 32)
    cases = {
        "z": dict(z=z, image=g.synthesis(mapped), w=mapped),
        "psi": dict(z=z, psi=0.5, image=g.synthesis(cut)),
        "w": dict(w=w, image=g.synthesis(as_tensor["w"])),
        "no noise": dict(w=w, noise="none", image=g.synthesis(as_tensor["w"], silent)),
        "w_plus": dict(w_plus=as_tensor["w"][:, None].expand(-1, 8, -1), image=g.synthesis(as_tensor["w"])),
        "8 bits": dict(z=z, image=pixels),
        "8 bits, channels last": dict(z=z, image=pixels.permute(0, 2, 3, 1)),
        "source": dict(source=x, image=net(x)),
    }
    for name, values in cases.items():
        np.savez(tmp_path / "v.npz", **{k: np.asarray(v) for k, v in values.items()})
        results = parity(file, tmp_path / "v.npz")
        assert results and all(result.agrees for result in results), (name, [str(r) for r in results])
        assert len(results) == 1 + (name == "z")
        values["image"] = np.asarray(values["image"])
        values["image"] = values["image"] + (3 if values["image"].dtype == np.uint8 else np.float32(0.01))
        np.savez(tmp_path / "v.npz", **{k: np.asarray(v) for k, v in values.items()})
        assert not parity(file, tmp_path / "v.npz")[-1].agrees, name
        assert parity(file, tmp_path / "v.npz", tolerance=200.0)[-1].agrees, name


@torch.no_grad()
def test_parity_with_an_image(tmp_path):
    from PIL import Image

    net = generator()
    save_generator(tmp_path / "g.safetensors", net, latent_avg=(torch.ones(16), "given"))
    z = torch.tensor(np.random.RandomState(7).randn(1, 16), dtype=torch.float32)
    image = net(z, psi=0.7, latent=torch.ones(16))[0]
    pixels = (image.permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "seed0007.png")
    (result,) = parity(tmp_path / "g.safetensors", tmp_path / "seed0007.png", seed=7, psi=0.7)
    assert result.agrees and result.largest <= 1, str(result)
    assert not parity(tmp_path / "g.safetensors", tmp_path / "seed0007.png", seed=8, psi=0.7)[0].agrees


def test_parity_needs_values_that_fit(tmp_path):
    save_generator(tmp_path / "g.safetensors", generator(), latent_avg=(torch.zeros(16), "given"))
    image = np.zeros((1, 3, 32, 32), np.float32)
    for values, message in (
        (dict(image=image), "exactly one of z, w, w_plus, source"),
        (dict(w=np.zeros((1, 16))), "lacks 'image'"),
        (dict(w=np.zeros((1, 16)), z=np.zeros((1, 16)), w_plus=np.zeros((1, 8, 16)), image=image), "exactly one"),
        (dict(w=np.zeros((1, 16)), image=image[:, :, :4]), r"image has shape \(1, 3, 4, 32\)"),
        (dict(w=np.zeros((1, 5)), image=image), "takes codes"),
        (dict(z=np.full((1, 16), np.nan), image=image), "z is empty, not finite"),
        (dict(z=np.zeros((1, 16)), image=image * np.nan), "image is empty, not finite"),
        (dict(z=np.zeros((1, 16)), image=image + np.inf), "image is empty, not finite"),
        (dict(z=np.zeros((0, 16)), image=image[:0]), "z is empty"),
        (dict(z=np.zeros((1, 16)), image=image, psi="half"), "psi is .*of a wrong type"),
        (dict(z=np.zeros((1, 16)), image=image, psi=np.ones(3)), "psi must be one number, not 3"),
        (dict(source=image, image=image), "generator without an encoder"),
        (dict(w=np.zeros((1, 16)), noise="random", image=image), "noise='random'"),
    ):
        np.savez(tmp_path / "v.npz", **values)
        with pytest.raises(UserError, match=message):
            parity(tmp_path / "g.safetensors", tmp_path / "v.npz")
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    (tmp_path / "x.png").write_bytes(b"nonsense")
    for name, message in (("x.npz", "not an .npz"), ("x.png", "Cannot read image"), ("none.npz", "does not exist")):
        with pytest.raises(UserError, match=message):
            parity(tmp_path / "g.safetensors", tmp_path / name)


# --- files of other kinds ------------------------------------------------------------------------------------------

ZERO = torch.zeros(1)
OTHERS = {
    "StyleGAN1": ({"g_running": {"generator.progression.0.conv.0.weight": ZERO}}, "StyleGAN1"),
    "lucidrains": ({"GAN": {}, "GAN.S.net.0.weight": ZERO}, "lucidrains"),
    "genforce": ({"generator_smooth": {}, "mapping.dense0.weight": ZERO}, "another toolbox"),
    "mmgeneration": ({"state_dict": {"generator.style_mapping.1.weight": ZERO}}, "another toolbox"),
    "diffusion": ({"state_dict": {"model.diffusion_model.input_blocks.0": ZERO}}, "diffusion model"),
    "face recognition": ({"input_layer.0.weight": ZERO, "output_layer.0.weight": ZERO}, "psp-weights list"),
    "lightning": (
        {"pytorch-lightning_version": "1.9", "state_dict": {"net.a": ZERO, "loss.b": ZERO}},
        r"Lightning checkpoint of another project; its network has the parts net, loss.*torch\.save\(",
    ),
    "discriminator": ({"convs.0.0.weight": ZERO, "final_conv.0.weight": ZERO}, "only a discriminator"),
    "StyleGAN3 state": ({"synthesis.input.weight": ZERO, "mapping.fc0.weight": ZERO}, "StyleGAN3"),
    "nothing": ({"a": ZERO}, "contains no StyleGAN2 generator.*its keys are: a"),
    "empty": ({}, "its keys are: none"),
    "too large": ({"g_ema": {"input.input": ZERO}}, "its keys are: g_ema"),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_unsupported_checkpoints_are_identified(tmp_path, name):
    content, message = OTHERS[name]
    with pytest.raises(UserError, match=message) as error:
        import_file(saved(content, tmp_path / "p.pt"))
    assert "p.pt" in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from TorchScript
def test_unsupported_files_are_identified(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    save_file({"down_blocks.0.weight": torch.zeros(2)}, tmp_path / "unet.safetensors")
    heads = {
        "model.onnx": b"\x08\x07\x12\x07pytorch",
        "keras.h5": b"\x89HDF\r\n",
        "x.gz": b"\x1f\x8b\x08",
        "page.pt": b"<!DOCTYPE html>",
        "x.tar": b"a" * 257 + b"ustar",
    }
    for file, head in heads.items():
        (tmp_path / file).write_bytes(head + bytes(600))
    for file, message in (
        ("script.pt", "TorchScript program.*state_dict"),
        ("a.npz", "NumPy archive"),
        ("unet.safetensors", "diffusion model"),
        ("model.onnx", "ONNX model"),
        ("keras.h5", "HDF5"),
        ("x.gz", "gzip archive: unpack"),
        ("page.pt", "HTML page"),
        ("x.tar", "tar archive"),
        ("missing.pt", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            import_file(tmp_path / file)


@torch.no_grad()
def test_small_expanded_tensors_are_read(tmp_path):
    """Users save one average expanded to all styles, and parameters instead of tensors."""
    net = generator()
    weights = {key: torch.nn.Parameter(value) for key, value in net.state_dict().items()}
    content = {"g_ema": weights, "latent_avg": torch.ones(16).expand(8, -1), "args": argparse.Namespace(size=32)}
    for name, options in (("new", {}), ("old", {"_use_new_zipfile_serialization": False})):
        found = import_file(saved(content, tmp_path / f"{name}.pt", **options))
        assert torch.equal(found.latent_avg, torch.ones(16)) and torch.equal(
            found.generator.input.input, net.input.input
        )


def test_reading_gives_the_same_as_torch(tmp_path):
    """Values, types, shapes and strides agree for both formats, and nothing shares memory with the file."""
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "tensors": [base, base.t(), base[1:, ::2], base[2], torch.empty(0, 3), torch.tensor(5), base.half(), base > 3],
        "dtypes": [torch.ones(3).to(d) for d in (torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8)],
        "plain": {"a": (1, 2.5, None, True, "x", -(2**70)), 3: [b"bytes", {1, 2}], "size": torch.Size([1, 2])},
        "state": torch.nn.BatchNorm2d(2).state_dict(),
    }
    for zipped in (True, False):
        file = saved(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        found, expected = read(file), torch.load(file, weights_only=True)
        assert found["plain"] == expected["plain"] and found["state"].keys() == expected["state"].keys()
        for kind in ("tensors", "dtypes"):
            for a, b in zip(found[kind], expected[kind], strict=True):
                assert torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride())
        found["tensors"][0].zero_()
        assert torch.equal(read(file)["tensors"][0], base)
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="asks for torch.ComplexFloatStorage"):
        read(tmp_path / "x.pt")


def test_networks_larger_than_their_file_are_not_built(tmp_path):
    """Networks are sized by their tensors, so expanded tensors or very many of them must be rejected."""
    state = {k: v.clone() for k, v in generator(output_size=8, max_channels=2).state_dict().items()}
    large = dict(state)
    for i in range(1, 20):  # 19 more doublings
        for key in [key for key in state if key.startswith(("to_rgbs.0.", "convs.0.", "convs.1."))]:
            head, number, rest = key.split(".", 2)
            large[f"{head}.{int(number) + (2 * i if head == 'convs' else i)}.{rest}"] = state[key]
    with pytest.raises(UserError, match="up-sampling blocks would make images of"):
        import_file(saved({"g_ema": large}, tmp_path / "g.pt"))
    state["style.1.weight"] = torch.zeros(1).expand(1 << 15, 1 << 15)
    with pytest.raises(UserError, match=r"expand\(\).*saved with torch\.save after \.clone\(\) \(shape \(32768,"):
        import_file(saved({"g_ema": state}, tmp_path / "g.pt"))


# --- hostile files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured through Linux's /proc")
@pytest.mark.slow
def test_hostile_files_are_refused(tmp_path):
    """One process reads over three hundred files, and its memory and time are measured for each."""
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile_files.py"), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": str(SOURCE.parent)},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"the process died at {last}: {done.stderr[-2000:]}"
    results = json.loads(done.stdout)
    assert len(results) >= 320
    for name, (outcome, seconds, memory, ran) in results.items():
        assert not ran, f"{name}: its code was executed"
        assert outcome.startswith("refused: "), f"{name}: {outcome}"
        assert re.search(r"\d+\.(pt|pkl|safetensors)", outcome) and len(outcome) < 900, f"{name}: unclear, {outcome}"
        assert seconds < hostile.SECONDS, f"{name}: {seconds:.1f} s"
        assert memory < hostile.MEMORY, f"{name}: {memory >> 20} MiB"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite(tmp_path, value):
    for name, data in hostile.not_finite(float(value)).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="not finite"):
            import_file(tmp_path / name)


def test_checksums_of_archives(tmp_path):
    """A flipped bit in a weight is detected. Files written without checksums can still be read."""
    state = generator().state_dict()
    data = saved({"g_ema": state}, tmp_path / "g.pt").read_bytes()
    number = state["convs.0.conv.weight"].numpy().tobytes()
    at = data.index(number) + 40
    (tmp_path / "flipped.pt").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(UserError, match=r"1 of its \d+ parts do not match their checksums, first .*data/"):
        import_file(tmp_path / "flipped.pt")
    computes = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        saved({"g_ema": state}, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(computes)
    assert torch.equal(import_file(tmp_path / "without.pt").generator.input.input, state["input.input"])


def test_the_valid_files_are_accepted(tmp_path):
    """The malformed files are derived from these."""
    for name, data in hostile.good().items():
        (tmp_path / name).write_bytes(data)
        assert import_file(tmp_path / name).generator.output_size == 8, name


def test_the_package_never_unpickles():
    """The only reader of pickles is the restricted one, which imports nothing."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"weights_only\s*=\s*(?!True\b)", text), f"{path.name}: weights_only"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                raise AssertionError(f"{path.name}:{node.lineno} reads with torch.load")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("allow_pickle") == "False", f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
                raise AssertionError(f"{path.name}:{node.lineno} uses {node.id}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "compile":  # also the name of a setting
                raise AssertionError(f"{path.name}:{node.lineno} compiles")
        if path.name != "torch_files.py":
            assert not re.search(r"pickle\.(load|loads|Unpickler|_Unpickler)\b", text), f"{path.name} unpickles"


def test_encoder_types_are_known():
    assert not set(convert.ENCODER_NAMES) & set(convert.RESTYLE)
    assert not set(convert.RESTYLE_RESNET) & {*convert.ENCODER_NAMES, *convert.RESTYLE}


def test_a_safetensors_file_that_begins_like_a_pickle(tmp_path: Path) -> None:
    """Its first byte is the lowest byte of the header's length. Every pickle begins with 0x80."""
    generator, file = Generator(8, style_dim=4, n_mapping=1, max_channels=4), tmp_path / "generator.safetensors"
    for n in range(0, 512, 8):
        save_generator(file, generator, {"data": "x" * n})
        if file.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no length of the description produced such a header")
    assert import_file(file).net.config == generator.config
    with pytest.raises(UserError, match="is a safetensors file"):
        read(file)

"""ReStyle's encoders: the published layout, their passes, gradients, released files that cannot be built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from psp_lightning.build.training import load_backbone
from psp_lightning.importers.imports import import_file
from psp_lightning.inference.export import SUFFIXES, export
from psp_lightning.loading import load_psp
from psp_lightning.models.encoders import ReStyleEncoder, ReStyleEncoder4Editing
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "reference_state_dicts.json").read_text())["encoder"]
KINDS = {"BackboneEncoder": ReStyleEncoder, "ProgressiveBackboneEncoder": ReStyleEncoder4Editing}
CLASSES = list(KINDS.values())


def network(cls=ReStyleEncoder, iterations: int = 3, size: int = 64, **generator) -> PSP:
    decoder = Generator.seeded(0, output_size=size, style_dim=16, n_mapping=2, max_channels=8, **generator)
    torch.manual_seed(0)
    encoder = cls(decoder.n_styles, style_dim=16, input_size=32, iterations=iterations, blocks=(1, 1, 1, 1), width=4)
    return PSP(encoder, decoder, torch.randn(16), source={"kind": "rgb", "size": 32}).eval()


def released(net: PSP, encoder_type: str = "BackboneEncoder", **opts) -> dict:
    state = {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in net.generator.state_dict().items()}
    # the options that its training writes, for any value of start_from_latent_avg
    opts = {"encoder_type": encoder_type, "input_nc": 6, "start_from_latent_avg": False, "n_iters_per_batch": 3} | opts
    return {"state_dict": state, "latent_avg": net.latent_avg.clone(), "opts": opts}


def by_hand(net: PSP, x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Compute ReStyle's passes, head by head."""
    encoder = net.encoder
    codes = net.latent_avg.expand(len(x), -1, -1)
    for _ in range(iterations):
        image = F.adaptive_avg_pool2d(net.generator.synthesis(codes), (32, 32)).detach()
        features = encoder.body(encoder.input_layer(torch.cat([x, image], dim=1)))
        steps = [head(features) for head in encoder.styles]
        if isinstance(encoder, ReStyleEncoder4Editing):
            steps = [steps[0]] + [steps[0] + step for step in steps[1:]]
        codes = codes + torch.stack(steps, dim=1)
    return codes


@pytest.mark.parametrize("cls", CLASSES)
def test_published_layout(cls):
    """pSp's body with six input channels and 18 heads, which all start at 16 px like pSp's first, without a pyramid."""
    psp = SHAPES["GradualStyleEncoder/n_styles=8/input_nc=3"]
    expected = {k: v for k, v in psp.items() if k.startswith(("input_layer.", "body."))}
    expected["input_layer.0.weight"] = [64, 6, 3, 3]
    head = {k.removeprefix("styles.0."): v for k, v in psp.items() if k.startswith("styles.0.")}
    expected |= {f"styles.{i}.{k}": v for i in range(18) for k, v in head.items()}
    assert len(head) == 10
    with torch.device("meta"):
        net = cls(18)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == expected
    assert net.iterations == 5 and net.in_channels == 3


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("cls", CLASSES)
@torch.no_grad()
def test_passes(cls, iterations):
    net, x = network(cls, iterations), torch.rand(2, 3, 32, 32) * 2 - 1
    expected = by_hand(net, x, iterations)
    assert (net.encode(x) - expected).abs().max() < 1e-5
    assert (net.encode(x[:1]) - expected[:1]).abs().max() < 1e-5
    assert (net(x) - net.decode(expected)).abs().max() < 1e-5
    again = PSP.from_description(net.describe()).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.encode(x), net.encode(x))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        fast = net.for_inference(dtype).encode(x)
        assert fast.dtype == torch.float32 and (fast - expected).abs().max() < bound * expected.abs().max()


def test_gradients_flow_through_the_codes_of_all_passes():
    net, x = network(), torch.rand(2, 3, 32, 32)
    found, expected = [
        torch.autograd.grad(codes.square().sum(), list(net.encoder.parameters()))
        for codes in (net.encode(x), by_hand(net, x, 3))
    ]
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(found, expected, strict=True))
    assert found[0][:, :3].abs().max() > 0 and found[0][:, 3:].abs().max() > 0


@pytest.mark.parametrize("encoder_type", KINDS)
@torch.no_grad()
def test_released_files(tmp_path, encoder_type):
    net = network(KINDS[encoder_type])
    torch.save(released(net, encoder_type, dataset_type="ffhq_encode"), tmp_path / "p.pt")
    found = import_file(tmp_path / "p.pt")
    assert found.source == "released ReStyle checkpoint" and not found.notes
    assert all(result == "matched" for _, _, result in found.rows), found.rows
    assert dict(found.summary())["encoder"] == f"{KINDS[encoder_type].__name__}, 3 channels of 32 px, 3 passes"
    found.save(tmp_path / "o.safetensors")
    x = torch.rand(2, 3, 32, 32)
    for again in (load_psp(tmp_path / "p.pt"), load_psp(tmp_path / "o.safetensors")):
        assert type(again.encoder) is KINDS[encoder_type] and again.source["kind"] == "rgb"
        assert (again.encode(x) - by_hand(net, x, 3)).abs().max() < 1e-5
    alone = import_file(tmp_path / "p.pt", what="generator")
    assert alone.kind == "generator" and torch.equal(alone.latent_avg, net.latent_avg[0])
    content = released(net, encoder_type)
    del content["opts"]["n_iters_per_batch"]
    torch.save(content, tmp_path / "p.pt")
    assert load_psp(tmp_path / "p.pt").encoder.iterations == 5


@pytest.mark.parametrize(
    ("opts", "change", "message"),
    [
        ({"n_iters_per_batch": 0}, {}, "iterations=0: it must be 1 to 100"),
        ({"n_iters_per_batch": 10**9}, {}, "description does not fit its encoder: iterations"),
        ({"n_iters_per_batch": "5"}, {}, "iterations=5: it must be 1 to 100"),
        ({}, {"latent_avg": None}, "has no 'latent_avg'"),
    ],
)
def test_released_files_that_are_wrong(tmp_path, opts, change, message):
    torch.save(released(network(), **opts) | change, tmp_path / "p.pt")
    with pytest.raises(UserError, match=message):
        import_file(tmp_path / "p.pt")


def test_channels_of_a_released_file_cannot_be_changed(tmp_path):
    torch.save(released(network()), tmp_path / "p.pt")
    with pytest.raises(UserError, match="in_channels=4 is not for ReStyle"):
        import_file(tmp_path / "p.pt", in_channels=4)
    assert import_file(tmp_path / "p.pt", in_channels=3).kind == "psp"


def test_wrong_sources_and_arguments():
    net = network()
    for wrong, message in (
        (torch.rand(1, 4, 32, 32), "3 channels, got 4"),
        (torch.rand(1, 3, 64, 64), "32x32 sources, got 64x64"),
        (torch.rand(3, 32, 32), "batch"),
    ):
        with pytest.raises(UserError, match=message):
            net.encode(wrong)
    with pytest.raises(UserError, match="images of 3 channels, the generator makes 1"):
        network(image_channels=1).encode(torch.rand(1, 3, 32, 32))
    for arguments in ({"iterations": 0}, {"iterations": 101}, {"iterations": 2.5}):
        with pytest.raises(UserError, match="iterations"):
            ReStyleEncoder(8, **arguments)


def test_backbone_gives_the_image_channels_zero_weights(tmp_path):
    state = ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict()
    torch.save(state, tmp_path / "id.pth")
    encoder = ReStyleEncoder(2, style_dim=4, input_size=32)
    load_backbone(encoder, str(tmp_path / "id.pth"))
    first = encoder.input_layer[0].weight
    assert torch.equal(first[:, :3], state["input_layer.0.weight"]) and first[:, 3:].abs().max() == 0
    assert torch.equal(encoder.body[0].res_layer[1].weight, state["body.0.res_layer.1.weight"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["encoder", "both"])
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_exports(tmp_path, format, what):
    """`export` compares with PyTorch at batch 1 and 3. The encoder's file also contains the generator."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    done = export(network(iterations=2, size=32), tmp_path / f"x{SUFFIXES[format]}", format, what)
    assert done.difference < 1e-4 and "2 passes" in done.card.read_text()

"""Exports: every format and part agrees with PyTorch, cards describe the files, failures leave no files."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psp_lightning.checkpoints.weight_files import generator_hash, save_generator
from psp_lightning.inference import export as module
from psp_lightning.inference.export import FixedShapes, Part, averages, export
from psp_lightning.inference.model_card import facts_of
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.encoders import EncoderIntoW, EncoderIntoWPlus, GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

SUFFIX = {"onnx": "onnx", "torchscript": "pt", "safetensors": "safetensors"}


def network(cls=GradualStyleEncoder, channels: int = 3, kind: str = "rgb") -> PSP:
    torch.manual_seed(0)
    net = Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
    styles = {} if cls is EncoderIntoW else {"n_styles": net.n_styles}
    # as in the published networks, EncoderIntoWPlus pools a map whose side (16 px) is not a multiple of 7 to 7 px
    size = 256 if cls is EncoderIntoWPlus else 32
    encoder = cls(style_dim=16, in_channels=channels, input_size=size, blocks=(1, 1, 1, 1), width=4, **styles)
    return PSP(encoder, net, torch.randn(16), source={"kind": kind, "size": size}).eval()


def runner(path: Path):
    if path.suffix == ".pt":
        return torch.jit.load(path)
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    (name,) = (item.name for item in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["encoder", "generator", "both"])
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@torch.no_grad()
def test_agrees_with_pytorch_at_batch_1_and_3(format: str, what: str, tmp_path: Path) -> None:
    net = network()
    path = tmp_path / f"x.{SUFFIX[format]}"
    done = export(net, path, format, what)
    run, source = runner(path), torch.rand(3, 3, 32, 32) * 2 - 1
    for batch in (1, 3):
        x = source[:batch] if what != "generator" else net.encode(source[:batch])
        expected = net(x) if what == "both" else net.encode(x) if what == "encoder" else net.decode(x)
        found = run(x)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-3
        assert torch.equal(found, run(x)), "noise must be constant"
    assert done.difference < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, path.name + ".md"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [EncoderIntoW, EncoderIntoWPlus])
@torch.no_grad()
def test_other_encoders(cls, tmp_path: Path) -> None:
    net = network(cls, channels=1, kind="sketch")
    for format in ("onnx", "torchscript"):
        path = tmp_path / f"x.{SUFFIX[format]}"
        export(net, path, format)
        x = torch.rand(3, 1, net.encoder.input_size, net.encoder.input_size)
        assert (runner(path)(x) - net(x)).abs().max() < 1e-3


def test_graph_has_standard_operators_and_a_free_batch(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    export(network(), tmp_path / "x.onnx", "onnx")
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}, "onnxruntime does not know an operator"
    (source,), (image,) = model.graph.input, model.graph.output
    for tensor, name, shape in ((source, "source", [3, 32, 32]), (image, "image", [3, 32, 32])):
        dims = tensor.type.tensor_type.shape.dim
        assert tensor.name == name and dims[0].dim_param == "batch"
        assert name == "image" or [dim.dim_value for dim in dims[1:]] == shape
    weights = [list(item.dims) for item in model.graph.initializer]
    assert all(len(shape) < 5 for shape in weights), "the weights must not depend on the sample"


@torch.no_grad()
def test_safetensors_can_be_loaded_again(tmp_path: Path) -> None:
    net = network()
    export(net, tmp_path / "p.safetensors", "safetensors", facts={"checkpoint": "a.ckpt", "origin": {"licence": "MIT"}})
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_psp(tmp_path / "p.safetensors")(x), net(x))
    assert facts_of(tmp_path / "p.safetensors")["origin"] == {"licence": "MIT", "exported_from": "a.ckpt"}
    export(net, tmp_path / "g.safetensors", "safetensors", "generator")
    generator, average = load_generator(tmp_path / "g.safetensors")
    assert generator_hash(generator) == generator_hash(net.generator)
    assert average is not None and torch.equal(average.expand(8, -1), net.latent_avg), "the average is the checkpoint's"
    with pytest.raises(UserError, match="what=both"):
        export(net, tmp_path / "e.safetensors", "safetensors", "encoder")


def test_the_network_is_not_changed(tmp_path: Path) -> None:
    net = network()
    net.generator.use_half(16)
    net.encoder.train()
    net.generator.half()
    net.generator.requires_grad_(True)
    modes = {name: item.training for name, item in net.named_modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    export(net, tmp_path / "x.onnx", "onnx")
    assert net.generator.half_from == 16 and net.generator.input.input.dtype == torch.float16
    assert {name: item.training for name, item in net.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# --- the card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["generator", "both"])
@pytest.mark.parametrize("format", ["onnx", "torchscript", "safetensors"])
def test_card_describes_the_file(format: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_generator(tmp_path / "g.safetensors", network().generator, {"licence": "CC0", "images": "drawn\nfaces"})
    facts = facts_of(tmp_path / "g.safetensors")
    path = tmp_path / f"x.{SUFFIX[format]}"
    done = export(network(kind="sketch", channels=1), path, format, what, facts)
    text = done.card.read_text()
    assert facts["sha256"] in text and "licence: CC0" in text and "images: drawn faces" in text
    assert ("grey in [0, 1]" in text) == (what == "both") and "not clamped" in text
    assert generator_hash(network().generator)[:16] in text and "at batch 1 and 3" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)  # the call shown on the card must work
    assert tuple(names["image"].shape) == (1, 3, 32, 32)  # type: ignore[attr-defined]


def test_card_of_a_network_of_unknown_origin(tmp_path: Path) -> None:
    text = export(network(), tmp_path / "x.safetensors", "safetensors").card.read_text()
    assert "a network in memory" in text and "licence: not in the checkpoint" in text


# --- errors


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UserError, match="onnxruntime: pip install onnx onnxruntime"):
        export(network(), tmp_path / "x.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_export_packages_are_not_imported_with_the_library() -> None:
    code = "import sys, psp_lightning.cli.export, psp_lightning.inference.export; print('onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_file_that_disagrees_is_removed(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x.{SUFFIX[format]}"
    path.write_text("former")
    make = getattr(module, f"_{format}")
    monkeypatch.setattr(module, f"_{format}", lambda *args: lambda x: make(*args)(x) + 0.1)
    with pytest.raises(UserError, match="differs by 0.1 at batch 1.*nothing was written"):
        export(network(), path, format)
    assert path.read_text() == "former" and len(list(tmp_path.iterdir())) == 1


class BatchEncoder(nn.Module):
    """An encoder whose trace supports only one batch size."""

    n_styles, style_dim, in_channels, input_size = 8, 16, 3, 32

    def forward(self, x):
        return x.mean((1, 2, 3)).view(int(x.shape[0]), 1, 1).expand(int(x.shape[0]), 8, 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_custom_encoder_with_a_fixed_batch_is_rejected(format: str, tmp_path: Path) -> None:
    net = PSP(BatchEncoder(), network().generator)
    with pytest.raises(UserError, match="at batch 1.*nothing was written"):
        export(net, tmp_path / f"x.{SUFFIX[format]}", format)
    assert not list(tmp_path.iterdir())


def test_untraceable_network_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(BatchEncoder):
        def forward(self, x):
            return torch.linalg.eigvals(x[:, :, :16, :16]).real.mean(1)[:, None].expand(-1, 8, -1)

    with pytest.raises(UserError, match="cannot be exported") as caught:
        export(PSP(Odd(), network().generator), tmp_path / "x.onnx", "onnx")
    assert len(str(caught.value).splitlines()) == 1 and not capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_generator_has_no_encoder_to_export() -> None:
    with pytest.raises(UserError, match="what=generator"):
        Part(PSP(nn.Identity(), network().generator), "both")


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 7), (9, 5, (4, 3)), (8, 8, 4), (5, 16, 7)])
def test_pooling_as_matrices(height: int, width: int, size: int | tuple[int, int]) -> None:
    x = torch.randn(2, 3, height, width)
    with FixedShapes():
        found = F.adaptive_avg_pool2d(x, size)
    assert torch.allclose(found, F.adaptive_avg_pool2d(x, size), atol=1e-6)
    assert torch.allclose(averages(height, 4).sum(1), torch.ones(4))


@pytest.mark.parametrize("format", SUFFIX)
def test_a_folder_whose_name_is_not_utf8(format: str, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        with pytest.raises(UserError, match="needs a folder whose name is UTF-8"):
            export(network(), folder / "net.onnx", format)
        assert not list(folder.iterdir())
        folder = tmp_path  # the name of the file may be any
    path = folder / os.fsdecode(b"net\xe9." + SUFFIX[format].encode())
    done = export(network(), path, format)
    assert done.path.is_file() and "net\\udce9" in done.card.read_text(encoding="utf-8")


def test_a_folder_in_place_of_the_card_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "net.pt.md").mkdir()
    with pytest.raises(UserError, match="net.pt.md is a folder"):
        export(network(), tmp_path / "net.pt", "torchscript")
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["onnx", "torchscript", "safetensors"])
@torch.no_grad()
def test_a_refiner_is_part_of_both(format: str, tmp_path: Path) -> None:
    plain = network()
    refiner = FeatureRefiner(16, 12, 32, width=16, blocks=1)
    torch.nn.init.normal_(refiner.change.weight, std=0.1)
    net = PSP(plain.encoder, plain.generator, plain.latent_avg, source=plain.source, refiner=refiner).eval()
    path = tmp_path / f"x.{SUFFIX[format]}"
    export(net, path, format, "both")
    card = path.with_name(f"{path.name}.md").read_text()
    assert "- refiner: FeatureRefiner, " in card and "changes the feature map of side 16\n" in card
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    assert not torch.allclose(net(x), plain(x), atol=1e-2)
    found = load_psp(path)(x) if format == "safetensors" else runner(path)(x)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if format != "safetensors" else {"rtol": 1e-2, "atol": 2e-2}  # float16
    torch.testing.assert_close(found, net(x), **tolerance)

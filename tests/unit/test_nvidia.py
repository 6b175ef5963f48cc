"""NVIDIA's StyleGAN2 pickles are written here as their repositories write them, then imported and compared."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from psp_lightning.checkpoints.torch_files import Placeholder
from psp_lightning.cli import weights
from psp_lightning.importers.imports import import_file
from psp_lightning.importers.nvidia import convert_nvidia, read_nvidia
from psp_lightning.loading import load_generator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvidia = load("nvidia_pickles")


def small(seed: int = 0, **config) -> Generator:
    config = {"output_size": 16, "style_dim": 12, "z_dim": 10, "n_mapping": 2, "max_channels": 8} | config
    return Generator.seeded(seed, **config).eval()


def state(net: Generator, seed: int = 0, lr: float = 0.01):
    """Return NVIDIA's tensors of a generator with noise."""
    draws = torch.Generator().manual_seed(seed)
    published = {k: v.clone() for k, v in net.state_dict().items()}
    for key, value in published.items():
        if key.endswith((".noise.weight", ".bias")):
            value += 0.1 * torch.randn(value.shape, generator=draws)
    net.load_state_dict(published)
    return nvidia.from_published(net.state_dict(), torch.randn(net.style_dim, generator=draws), lr)


def conditional(classes: int = 5, embed: int = 7, seed: int = 0):
    """Return the tensors of a network with labels."""
    net = small(seed)
    tensors = state(net)
    draws = torch.Generator().manual_seed(seed + 1)
    tensors["mapping.embed.weight"] = torch.randn(embed, classes, generator=draws)
    tensors["mapping.embed.bias"] = 0.5 * torch.randn(embed, generator=draws)
    tensors["mapping.fc0.weight"] = 100 * torch.randn(12, 10 + embed, generator=draws)
    return net, tensors


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["psp-weights", *map(str, arguments)])
    try:
        weights.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


@torch.no_grad()
def test_golden_values_through_the_command(golden, reference, tmp_path, monkeypatch, capsys):
    tensors = golden.state_dict(golden.shapes()["stylegan2_ada_32"], "ada.")
    canary = tmp_path / "canary"
    file = nvidia.write(tmp_path / "n.pkl", nvidia.snapshot(nvidia.network(tensors)), canary=canary)
    out = tmp_path / "g.safetensors"
    assert command(monkeypatch, "import", file, f"out={out}") == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "32 px" in text and "the file's w_avg" in text and "config-f" in text and "matched" in text
    net, average = load_generator(out)
    assert torch.equal(average, tensors["mapping.w_avg"])
    image = net.synthesis(torch.from_numpy(golden.normal("ada_a.ws", 2, 8, 512)))
    w = net.mapping(torch.from_numpy(golden.normal("ada_a.z", 2, 512)))
    for name, found in (("ada_a.image", image), ("ada_a.w", w)):
        worst = np.abs(found.numpy() - reference[name]).max()
        assert worst <= 1e-4, f"{name} is off by {worst}"
    assert not canary.exists(), "the class's source code was executed"

    np.savez(tmp_path / "v.npz", w_plus=golden.normal("ada_a.ws", 2, 8, 512), image=reference["ada_a.image"])
    np.savez(tmp_path / "w.npz", z=golden.normal("ada_a.z", 2, 512), w=reference["ada_a.w"] * 1.001)
    assert command(monkeypatch, "parity", out, "--against", tmp_path / "v.npz") == 0
    assert command(monkeypatch, "parity", out, f"against={tmp_path / 'w.npz'}") == 1
    captured = capsys.readouterr()
    assert "image: agrees" in captured.out and "w: DIFFERS" in captured.out and "differ from" in captured.err


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@torch.no_grad()
def test_protocols_and_gains(tmp_path, protocol):
    net = small()
    tensors = state(net, lr=0.02)
    content = nvidia.snapshot(nvidia.network(tensors, lr=0.02))
    found = import_file(nvidia.write(tmp_path / "n.pkl", content, protocol))
    z = torch.randn(3, 10)
    assert torch.allclose(found.generator(z), net(z), atol=1e-5), "the mapping's gains must be those of the pickle"
    assert found.facts["network"] == "G_ema" and found.facts["activation_clamp"] is None


@torch.no_grad()
def test_the_network_can_be_chosen(tmp_path):
    net = nvidia.network(state(small()))
    raw = import_file(nvidia.write(tmp_path / "g.pkl", {"G": net, "D": None}))
    assert raw.facts["network"] == "G" and "no G_ema" in raw.notes[0]
    assert import_file(nvidia.write(tmp_path / "bare.pkl", net)).generator.output_size == 16
    discriminator = nvidia.snapshot(net)["D"]
    for content, message in (
        ({"D": discriminator}, r"no network G_ema or G; it contains D \(Discriminator\)"),
        ({"G_ema": discriminator}, "not a StyleGAN2 generator but a Discriminator"),
        ([1, 2], "contains a list"),
    ):
        with pytest.raises(UserError, match=message):
            import_file(nvidia.write(tmp_path / "x.pkl", content))


@torch.no_grad()
def test_activation_clamp_is_recorded_and_measured(tmp_path):
    net = small()
    content = nvidia.snapshot(nvidia.network(state(net), clamp=256))
    found = import_file(nvidia.write(tmp_path / "n.pkl", content))
    assert found.facts["activation_clamp"] == 256
    assert any("no effect" in note for note in found.notes), found.notes
    found = import_file(nvidia.write(tmp_path / "n.pkl", nvidia.snapshot(nvidia.network(state(net), clamp=1))))
    assert any("can differ" in note for note in found.notes), found.notes


@torch.no_grad()
def test_a_label_becomes_part_of_the_weights(tmp_path):
    net, tensors = conditional()
    file = nvidia.write(tmp_path / "n.pkl", nvidia.snapshot(nvidia.network(tensors)))
    z, images = torch.randn(4, 10), []
    for label in (0, 3, 4):
        found = import_file(file, label=label)
        w = found.generator.mapping(z)
        assert torch.allclose(w, nvidia.conditional_mapping(tensors, z, label), atol=1e-5)
        assert torch.allclose(found.generator.synthesis(w), net.synthesis(w), atol=1e-5)
        assert found.facts["label"] == label and found.generator.z_dim == 10
        assert any("label" in result for _, _, result in found.rows)
        assert torch.equal(found.latent_avg, tensors["mapping.w_avg"]) and "over all labels" in found.notes[0]
        images.append(w)
    assert not torch.allclose(images[0], images[1], atol=1e-2), "labels must make a difference"
    for label, message in ((None, "label=0 to label=4"), (5, "classes are 0 to 4"), (-1, "classes are 0 to 4")):
        with pytest.raises(UserError, match=message):
            import_file(file, label=label)
    plain = nvidia.write(tmp_path / "p.pkl", nvidia.network(state(net)))
    with pytest.raises(UserError, match="takes no labels: leave out label=3"):
        import_file(plain, label=3)


def without(tensors, *names):
    return {k: v for k, v in tensors.items() if not k.endswith(names)}


def attribute(path, name, value):
    """Return a change of the network that sets an attribute of a module."""

    def change(network):
        module = network
        for part in path.split("."):
            module = module.state["_modules"][part]
        module.state[name] = value

    return change


FIRST = "synthesis.b8.conv0"
BROKEN = {
    "resnet": (dict(architecture="resnet"), None, "architecture is 'resnet'"),
    "orig": (dict(architecture="orig"), None, "architecture is 'orig'"),
    "activation": ({}, attribute(FIRST, "activation", "relu"), "activation is 'relu'"),
    "mapping activation": ({}, attribute("mapping.fc0", "activation", "swish"), "mapping.fc0.activation is 'swish'"),
    "gain": ({}, attribute("mapping.fc0", "weight_gain", float("nan")), "weight_gain is nan"),
    "gain is text": ({}, attribute("mapping.fc0", "weight_gain", "x"), "weight_gain is 'x', not a positive"),
    "clamps": ({}, attribute(FIRST, "conv_clamp", 3), "clamps differ"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_unsupported_architectures(tmp_path, name):
    arguments, change, message = BROKEN[name]
    network = nvidia.network(state(small()), **{"clamp": 256, **arguments})
    if change is not None:
        change(network)
    with pytest.raises(UserError, match=message):
        import_file(nvidia.write(tmp_path / "n.pkl", network))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mapping.fc1.weight", lambda t: t.new_zeros(20, 12), r"fc1\.bias has shape \(12,\), expected \(20\)"),
        ("synthesis.b8.conv1.weight", lambda t: t[..., :1], r"expected \(any, any, 3, 3\)"),
        ("synthesis.b8.conv1.noise_const", lambda t: t[:4], r"noise_const has shape \(4, 8\)"),
        ("synthesis.b8.conv1.bias", lambda t: t * float("nan"), "values that are not finite"),
        ("synthesis.b4.const", lambda t: t / 0, "b4.const has values that are not finite"),
        ("synthesis.b8.conv0.resample_filter", lambda t: t.flip(0)[:2], "not the filter"),
        ("synthesis.b8.conv0.affine.weight", lambda t: t[:, :3], r"affine.weight has shape"),
        ("synthesis.b8.torgb.weight", lambda t: t[:, :2], "of another shape"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, change, message):
    tensors = state(small())
    tensors[name] = change(tensors[name])
    with pytest.raises(UserError, match=message):
        import_file(nvidia.write(tmp_path / "n.pkl", nvidia.network(tensors)))


def test_missing_and_unknown_tensors(tmp_path):
    tensors = state(small())
    with pytest.raises(UserError, match=r"b4\.conv1\.bias is missing"):
        import_file(nvidia.write(tmp_path / "n.pkl", nvidia.network(without(tensors, "b4.conv1.bias"))))
    network = nvidia.network(tensors)
    network.state["_modules"]["mapping"].state["_buffers"]["magnitude_ema"] = torch.ones(1)
    with pytest.raises(UserError, match=r"belong to no known StyleGAN2 generator: mapping\.magnitude_ema"):
        import_file(nvidia.write(tmp_path / "n.pkl", network))


@torch.no_grad()
def test_without_noise_and_average(tmp_path):
    net = small()
    tensors = without(state(net), "noise_const", "noise_strength", "w_avg")
    found = import_file(nvidia.write(tmp_path / "n.pkl", nvidia.network(tensors)))
    codes = torch.randn(1, 6, 12)
    silent = [torch.zeros(1, 1, side, side) for side in net.noise_sides()]
    assert torch.allclose(found.generator.synthesis(codes), net.synthesis(codes, silent), atol=1e-5)
    assert found.latent_avg is None and "the file has none" in found.average
    assert ("noises", 5, "adapted: it has no noise: maps and strengths are zero") in found.rows


@torch.no_grad()
def test_state_dicts_in_the_layout(tmp_path):
    """Import files of torch.save(G.state_dict()), with the constructors' default gains."""
    net = small()
    tensors = state(net)
    for name, prefix in (("plain", ""), ("wrapped", "module."), ("inner", "G_ema.")):
        torch.save({prefix + key: value for key, value in tensors.items()}, tmp_path / f"{name}.pt")
        found = import_file(tmp_path / f"{name}.pt")
        z = torch.randn(2, 10)
        assert torch.allclose(found.generator(z), net(z), atol=1e-5), name
        assert "state dict in NVIDIA's layout" in found.source


def test_stylegan3_is_identified(tmp_path):
    network = nvidia.Persistent("Generator")
    network.child("mapping", "MappingNetwork")
    synthesis = network.child("synthesis", "SynthesisNetwork")
    synthesis.child("input", "SynthesisInput")
    synthesis.child("L0_36_1024", "SynthesisLayer")
    with pytest.raises(UserError, match=r"StyleGAN3 generator.*--cfg=stylegan2"):
        import_file(nvidia.write(tmp_path / "n.pkl", {"G_ema": network}))


# GLOBAL module name, EMPTY_TUPLE, REDUCE, STOP
def asks_for(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n)R."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dnnlib.tflib.network.Network", "TensorFlow pickle.*legacy.py.*import the result"),
        ("torch.nn.modules.container.Sequential", r"whole Python objects \(torch.nn.modules.*state_dict"),
        ("training.networks.Generator", "whole Python objects"),
        ("os.system", "asks for os.system"),
        ("builtins.eval", "asks for builtins.eval"),
        ("copyreg._reconstructor", "asks for copyreg._reconstructor"),
    ],
)
def test_other_pickles_are_identified(tmp_path, name, message):
    (tmp_path / "n.pkl").write_bytes(asks_for(name))
    with pytest.raises(UserError, match=f"refused and nothing in it was run.*{message}"):
        import_file(tmp_path / "n.pkl")


def test_the_unpickler_gives_inert_values(tmp_path):
    content = {
        "plain": [1, 2.5, "text", b"bytes", None, True, (1, 2), {3, 4}, {"a": {"b": []}}],
        "numpy": np.float64(0.25),
        "array": np.zeros(3),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "tensor": torch.arange(6).reshape(2, 3).t(),
        "half": torch.ones(2, dtype=torch.float16),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    found = read_nvidia(nvidia.write(tmp_path / "a.pkl", content))
    assert found["plain"] == content["plain"] and found["numpy"] == 0.25 and found["size"] == (1, 2)
    assert torch.equal(found["tensor"], content["tensor"]) and found["empty"].shape == (0, 3)
    assert found["half"].dtype == torch.float16 and found["bfloat"].dtype == torch.bfloat16
    assert type(found["parameter"]) is torch.Tensor and type(found["array"]) is Placeholder
    with pytest.raises(UserError, match="contains a str"):
        convert_nvidia("text")
    shared = [1]
    loop: dict = {"shared": [shared, shared]}
    loop["self"] = loop
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps(loop))
    assert read_nvidia(tmp_path / "loop.pkl")["shared"] == [[1], [1]]

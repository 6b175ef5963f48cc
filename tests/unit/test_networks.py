"""The library's weight files (safetensors): all kinds round-trip; a wrong or hostile file is one quick, clear error."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.safetensors_io import KEY, read_described, save_described
from psp_lightning.checkpoints.weight_files import save_embedding, save_generator, save_psp
from psp_lightning.inference.frozen import freeze_generator, freeze_psp_generator
from psp_lightning.loading import load_embedding, load_generator, load_psp
from psp_lightning.models import registry
from psp_lightning.models.encoders import EncoderIntoW, GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

HALF = {None: 0.0, torch.float16: 5e-3}


def generator(seed=1, **config):
    config = {"output_size": 32, "style_dim": 16, "n_mapping": 2, "max_channels": 12, "channel_base": 96} | config
    return Generator.seeded(seed, **config).eval()


def network(cls=GradualStyleEncoder, net=None):
    net = net or generator()
    torch.manual_seed(0)
    styles = {} if cls is EncoderIntoW else {"n_styles": net.n_styles}
    size = 256 if cls is EncoderIntoW else 32
    encoder = cls(in_channels=1, input_size=size, style_dim=16, blocks=(1, 1, 1, 1), width=4, **styles)
    return PSP(encoder, net, torch.randn(16), source={"kind": "sketch", "size": size}).eval()


class DummyEmbedding(nn.Module):
    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.config = {"dim": dim}
        self.norm, self.project = nn.BatchNorm1d(4), nn.Linear(4, dim)

    def forward(self, x):
        return self.project(self.norm(x))


@pytest.fixture
def embeddings(monkeypatch):
    """Register DummyEmbedding for one test."""
    monkeypatch.setitem(registry.EMBEDDINGS, "DummyEmbedding", DummyEmbedding)


def assert_near(a, b, tolerance):
    assert a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a - b).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("cls", [GradualStyleEncoder, EncoderIntoW])
def test_psp_with_its_generator(tmp_path, cls, dtype):
    net, path = network(cls), tmp_path / "new" / "net.safetensors"
    save_psp(path, net, {"made_by": "a test", "licence": "MIT"}, dtype)
    before = torch.get_rng_state()
    again = PSP.from_checkpoint(path)
    assert torch.equal(before, torch.get_rng_state()), "loading must not change the random state"
    assert not again.training and again.describe() == net.describe()
    x = torch.rand(2, 1, net.encoder.input_size, net.encoder.input_size)
    assert_near(again(x), freeze_psp_generator(net)(x), HALF[dtype])
    stored, average = load_generator(path)
    assert average.shape == (8, 16) and not stored.training
    w = torch.randn(2, 16)
    assert torch.equal(freeze_generator(stored).synthesis(w), again.generator.synthesis(w))
    assert read_described(path)[0]["origin"] == {"made_by": "a test", "licence": "MIT"}
    assert [file.name for file in path.parent.iterdir()] == [path.name], "temporary files were not removed"


@torch.no_grad()
def test_generator(tmp_path):
    net = generator(z_dim=10)
    save_generator(tmp_path / "g.safetensors", net)
    again, average = load_generator(tmp_path / "g.safetensors")
    assert again.config == net.config and torch.equal(average, net.latent_average(100_000, 0))
    z = torch.randn(2, 10)
    assert torch.equal(again(z), net(z))
    save_generator(tmp_path / "run" / "generator.safetensors", net)
    assert torch.equal(load_generator(tmp_path / "run")[0](z), net(z)), "a run folder of psp-train-generator"
    with pytest.raises(UserError, match=r"g\.safetensors is of kind 'generator', not 'psp'"):
        load_psp(tmp_path / "g.safetensors")


def test_an_older_description_without_channel_base(tmp_path):
    net = generator(channel_base=16384)
    config = {key: value for key, value in net.config.items() if key != "channel_base"}
    node = {"generator": {"class": "Generator", **config}}
    save_described(tmp_path / "g.safetensors", "generator", net.state_dict(), node)
    again, average = load_generator(tmp_path / "g.safetensors")
    assert again.config == net.config and average is None


@torch.no_grad()
def test_embedding(tmp_path, embeddings):
    torch.manual_seed(0)
    net, path = DummyEmbedding(5), tmp_path / "e.safetensors"
    net(torch.randn(8, 4) * 1e-4)
    net.norm.running_var.mul_(1e-9)  # below float16's smallest value
    save_embedding(path, net, {"licence": "MIT"}, torch.float16)
    again, x = load_embedding(path), torch.randn(3, 4) * 1e-4
    assert not again.training and torch.equal(again.norm.running_var, net.norm.running_var)
    assert_near(again(x), net.eval()(x), 5e-3)
    for load, kind in ((load_psp, "psp"), (load_generator, "generator")):
        with pytest.raises(UserError, match=f"e.safetensors is of kind 'embedding', not '{kind}'"):
            load(path)
    save_psp(tmp_path / "p.safetensors", network())
    with pytest.raises(UserError, match=r"p\.safetensors is of kind 'psp', not 'embedding'"):
        load_embedding(tmp_path / "p.safetensors")


def test_embedding_of_an_unregistered_class(tmp_path):
    save_embedding(tmp_path / "e.safetensors", DummyEmbedding())
    with pytest.raises(UserError, match=r"e\.safetensors.*Unknown embedding 'DummyEmbedding'.*register_embedding"):
        load_embedding(tmp_path / "e.safetensors")


def test_values_outside_float16s_range_are_not_stored(tmp_path):
    net = network()
    with torch.no_grad():
        net.encoder.input_layer[0].weight[0] = 1e6
    with pytest.raises(UserError, match=r"encoder\.input_layer\.0\.weight has values up to 1e\+06"):
        save_psp(tmp_path / "p.safetensors", net, dtype=torch.float16)
    save_psp(tmp_path / "p.safetensors", net)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_custom_encoder_that_computes_in_its_constructor(tmp_path, monkeypatch):
    class Computing(GradualStyleEncoder):
        def __init__(self, **config) -> None:
            super().__init__(**config)
            assert float(torch.ones(2).sum()) == 2

    monkeypatch.setitem(registry.ENCODERS, "Computing", Computing)
    net = network(Computing)
    save_psp(tmp_path / "p.safetensors", net)
    assert type(load_psp(tmp_path / "p.safetensors").encoder) is Computing


def test_readers_of_other_weights_name_the_format(tmp_path):
    save_generator(tmp_path / "g.safetensors", generator())
    with pytest.raises(UserError, match="is a safetensors file, but a checkpoint written by torch.save is needed"):
        read(tmp_path / "g.safetensors")


# --- hostile and damaged files -------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def described(description: object, **tensors: object) -> dict:
    text = description if isinstance(description, str) else json.dumps(description)
    return {"__metadata__": {KEY: text}, **tensors}


def wrong_files() -> dict[str, tuple[bytes, str]]:
    good = {"kind": "psp", "format": 1, "psp": {}}
    four = bytes(4)
    return {
        "huge shape": (raw({"a": tensor([2**62, 8], 0)}), "damaged"),
        "more than the file": (raw(described(good, a=tensor([2**30], 2**32))), "damaged"),
        "deep header": (raw(b'{"a":' + b"[" * 100_000 + b"}"), "damaged"),
        "deep description": (raw(described("[" * 100_000)), "damaged"),
        "long header": (raw(b"{" + b" " * (5 << 20) + b"}"), "a header of"),
        "length without header": (struct.pack("<Q", 1 << 26) + b"{}", "a header of"),
        "NaN": (raw(described('{"kind": "psp", "format": 1, "psp": NaN}')), "contains NaN"),
        "infinity": (raw(described('{"kind": "psp", "format": 1, "psp": 1e999}')), "contains 1e999"),
        "many digits": (raw(described('{"kind": "psp", "format": ' + "9" * 5000 + "}")), "more than 20 digits"),
        "no JSON": (raw(described("psp")), "damaged"),
        "a list": (raw(described([1])), "a different format"),
        "of tomorrow": (raw(described({**good, "format": 2})), "a different format"),
        "kind": (raw(described({**good, "kind": "x" * 10_000 + "\x1b[31m"})), "is of kind 'xxx"),
        "kind is a list": (raw(described({**good, "kind": ["psp"]})), "is of kind"),
        "foreign": (raw({"model.\x1b[31mweight": tensor([1], 4)}, four), r"without psp_lightning's.*model\.\\x1b"),
        "nothing": (raw({}), "it contains nothing"),
        "weight is NaN": (raw(described(good, a=tensor([1], 4)), struct.pack("<f", float("nan"))), "not finite in 'a'"),
        "complex": (raw(described(good, a=tensor([1], 8, "C64")), bytes(8)), "complex numbers in 'a'"),
        "no psp": (raw(described({"kind": "psp", "format": 1})), "description has format"),
        "psp is a list": (raw(described({**good, "psp": [1]})), "description has format"),
        "no encoder": (raw(described({**good, "psp": {"format": 1}})), "lacks its encoder"),
        "cut": (raw(described(good, a=tensor([1], 4)), four)[:-2], "damaged"),
    }


@pytest.mark.serial
@pytest.mark.parametrize("name", wrong_files())
def test_wrong_files(tmp_path, name):
    content, message = wrong_files()[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        load_psp(path)
    assert time.perf_counter() - start < 5, "a wrong file must be rejected quickly"
    assert str(path) in str(error.value) and len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


def greedy() -> dict[str, tuple[str, dict]]:
    """Return changes of a description that ask for more than the file contains."""
    return {
        "many styles": ("encoder", {"n_styles": 10**12}),
        "some more styles": ("encoder", {"n_styles": 10**6}),
        "deep encoder": ("encoder", {"blocks": [1, 1, 1, 10**6]}),
        "wide encoder": ("encoder", {"width": 10**6}),
        "negative": ("encoder", {"width": -4}),
        "text": ("encoder", {"width": "x"}),
        "another class": ("encoder", {"class": "os.system"}),
        "unknown argument": ("encoder", {"nonsense": 1}),
        "big image": ("generator", {"output_size": 1 << 20}),
        "larger image": ("generator", {"output_size": 1 << 60}),
        "deep mapping": ("generator", {"n_mapping": 10**6}),
        "long style": ("generator", {"style_dim": 10**6, "z_dim": 10**6}),
        "wide generator": ("generator", {"max_channels": 1 << 20, "channel_base": 1 << 20}),
        "fraction": ("generator", {"max_channels": 1.5}),
    }


@pytest.mark.parametrize("name", greedy())
def test_a_description_cannot_ask_for_more_than_the_tensors(tmp_path, name):
    net, (part, change) = network(), greedy()[name]
    node = net.describe()
    node[part] = {**node[part], **change}
    path = tmp_path / "p.safetensors"
    save_described(path, "psp", net.state_dict(), {"psp": node})
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_psp(path)
    assert time.perf_counter() - start < 10, "a wrong file must be rejected quickly"
    assert str(path) in str(error.value), error.value
    # the same description in a run's checkpoint
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"psp": node, "state_dict": state}, tmp_path / "p.ckpt")
    with pytest.raises(UserError, match=r"p\.ckpt"):
        load_psp(tmp_path / "p.ckpt")


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "g.safetensors"
    save_generator(path, generator())
    data = path.read_bytes()
    for end in (0, 1, 8, 9, 50, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        for load in (load_psp, load_generator, load_embedding):
            with pytest.raises(UserError, match=r"g\.safetensors"):
                load(path)


def test_missing_and_unexpected_tensors(tmp_path):
    net, path = network(), tmp_path / "p.safetensors"
    state = net.state_dict()
    del state["encoder.input_layer.0.weight"]
    save_described(path, "psp", {**state, "encoder.more": torch.zeros(1)}, {"psp": net.describe()})
    with pytest.raises(UserError, match=r"1 missing: encoder\.input_layer\.0\.weight; 1 unexpected: encoder\.more"):
        load_psp(path)
    stray = {**generator().state_dict(), "latent_avg": torch.zeros(5)}
    save_described(path, "generator", stray, {"generator": {"class": "Generator", **generator().config}})
    with pytest.raises(UserError, match="'latent_avg' does not fit a style of 16"):
        load_generator(path)


def test_a_description_is_plain_json(tmp_path):
    for bad in ({"loss": float("nan")}, {"path": Path("x")}):
        with pytest.raises((ValueError, TypeError)):
            save_generator(tmp_path / "g.safetensors", generator(), bad)
    assert not list(tmp_path.iterdir())

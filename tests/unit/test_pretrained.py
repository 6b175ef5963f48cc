"""Weights inside the package: found by name, compared with their records, in the wheel and in the sdist."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.toyfaces.records import LIMIT, main, write_records
from psp_lightning import PSP
from psp_lightning.checkpoints.safetensors_io import read_described, save_described
from psp_lightning.checkpoints.weight_files import save_embedding, save_generator, save_psp
from psp_lightning.loading import load_embedding, load_generator, load_psp
from psp_lightning.models import registry
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

ROOT = Path(__file__).parents[2]
ORIGIN = {"made_by": "psp-train domain=toyfaces", "licence": "MIT"}
HALF = torch.float16


class DummyEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config: dict = {}
        self.project = nn.Linear(4, 2)


def generator(seed=0):
    return Generator.seeded(seed, output_size=32, style_dim=16, n_mapping=2, max_channels=12)


def network(net, **source):
    torch.manual_seed(0)
    encoder = GradualStyleEncoder(net.n_styles, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    return PSP(encoder, net, torch.randn(16), source={"kind": "rgb", "size": 32} | source).eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a folder of shipped weights: a generator, an embedding, and a network that refers to the generator."""
    monkeypatch.setattr(locate, "shipped_dir", lambda: tmp_path / "weights")
    monkeypatch.setitem(registry.EMBEDDINGS, "DummyEmbedding", DummyEmbedding)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights" / "toyfaces"
    save_generator(folder / "generator.safetensors", generator(), ORIGIN, HALF)
    save_embedding(folder / "identity.safetensors", DummyEmbedding(), ORIGIN, HALF)
    write_records(folder)
    trained = network(load_generator("toyfaces/generator")[0])
    save_psp(folder / "inversion.safetensors", trained, ORIGIN, HALF, generator_file="toyfaces/generator")
    write_records(folder)
    return folder


@torch.no_grad()
def test_every_loader_accepts_names(folder):
    net = PSP.from_pretrained("toyfaces/inversion")
    assert not net.training and net.source == {"kind": "rgb", "size": 32}
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x), PSP.from_checkpoint("toyfaces/inversion")(x))
    assert torch.allclose(net(x), network(load_generator("toyfaces/generator")[0])(x), atol=5e-3)
    stored, average = load_generator("toyfaces/generator")
    assert average.shape == (16,) and torch.allclose(stored.input.input, generator().input.input, rtol=1e-3)
    assert type(load_embedding("toyfaces/identity")) is DummyEmbedding
    assert locate.find("toyfaces/generator") == folder / "generator.safetensors"
    again, _ = load_generator("toyfaces/inversion")  # the network's generator, loaded as from any checkpoint
    assert torch.equal(again.input.input, stored.input.input)


def test_a_network_refers_to_the_shipped_generator(folder):
    description, tensors = read_described(folder / "inversion.safetensors", "psp")
    digest = hashlib.sha256((folder / "generator.safetensors").read_bytes()).hexdigest()
    assert description["psp"]["generator"] == {"file": "toyfaces/generator", "sha256": digest}
    assert {name.partition(".")[0] for name in tensors} == {"encoder", "latent_avg"}


def test_a_path_with_the_same_name_takes_precedence(folder, tmp_path):
    own = network(generator(5), kind="sketch")
    save_psp(tmp_path / "toyfaces" / "inversion", own)
    assert load_psp("toyfaces/inversion").source["kind"] == "sketch"
    assert PSP.from_pretrained("toyfaces/inversion").source["kind"] == "rgb", "from_pretrained must accept only names"
    (tmp_path / "toyfaces" / "identity").mkdir()
    with pytest.raises(UserError, match="without a checkpoint.*hides the shipped weights toyfaces/identity"):
        load_embedding("toyfaces/identity")


@pytest.mark.parametrize("load", [load_psp, load_generator, load_embedding, locate.find])
def test_unknown_names(folder, load):
    with pytest.raises(UserError, match="no file or folder toyfaces/invertion.*Did you mean 'toyfaces/inversion'.*ide"):
        load("toyfaces/invertion")
    for path in ("./toyfaces/invertion", "toyfaces/more/inversion", "toyfaces", "faces/inversion"):
        with pytest.raises(UserError, match="does not exist|No public weights"):
            load(path)


def test_from_pretrained_accepts_only_networks(folder):
    for name in ("toyfaces/generator", "inversion", str(folder / "inversion.safetensors")):
        with pytest.raises(UserError, match="No shipped pSp network.*Known: toyfaces/inversion."):
            PSP.from_pretrained(name)


def test_another_generator_is_an_error(folder):
    save_generator(folder / "generator.safetensors", generator(7), ORIGIN, HALF)
    with pytest.raises(UserError, match=r"toyfaces/generator \(.*were changed.*Reinstall psp-lightning"):
        load_psp("toyfaces/inversion")
    with pytest.raises(UserError, match=r"inversion\.safetensors was made for a different toyfaces/generator"):
        write_records(folder)
    (folder / "inversion.safetensors").rename(folder.parent / "old.safetensors")
    write_records(folder)
    with pytest.raises(UserError, match=r"old\.safetensors: it was made for another toyfaces/generator"):
        load_psp(folder.parent / "old.safetensors")
    with pytest.raises(UserError, match="generator_file=toyfaces/generator: that is not the generator"):
        save_psp(folder / "new.safetensors", network(generator()), ORIGIN, generator_file="toyfaces/generator")
    assert not (folder / "new.safetensors").exists()


def test_files_refer_only_to_shipped_weights(folder):
    described = {**network(generator()).describe(), "generator": {"file": str(folder / "generator.safetensors")}}
    save_described(folder.parent / "x.safetensors", "psp", {"latent_avg": torch.zeros(8, 16)}, {"psp": described})
    with pytest.raises(UserError, match=r"x\.safetensors: There is no file or folder .*no weights of that name"):
        load_psp(folder.parent / "x.safetensors")


def test_missing_files_and_damaged_records(folder):
    (folder / "identity.safetensors").unlink()
    with pytest.raises(UserError, match="toyfaces/identity are missing"):
        load_embedding("toyfaces/identity")
    (folder / "records.json").write_text('{"toyfaces/a": {"file": "a"}}')
    with pytest.raises(UserError, match=r"records\.json is damaged"):
        load_psp("toyfaces/a")


def test_write_records(folder, capsys):
    records = json.loads((folder / "records.json").read_text())
    assert list(records) == ["toyfaces/generator", "toyfaces/identity", "toyfaces/inversion"]
    assert records["toyfaces/inversion"]["made_by"] == ORIGIN["made_by"]
    assert [entry["kind"] for entry in records.values()] == ["generator", "embedding", "psp"]
    main([str(folder), "--licence", "CC0-1.0", "--made-by", "identity=a b=c"])
    assert "toyfaces/identity" in capsys.readouterr().out
    assert locate.shipped()["toyfaces/identity"].made_by == "a b=c"
    assert {entry.licence for entry in locate.shipped().values()} == {"CC0-1.0"}
    save_generator(folder / "generator2.safetensors", generator(), {"licence": "MIT"})
    with pytest.raises(SystemExit, match=r"generator2\.safetensors does not state its made_by"):
        main([str(folder)])
    with pytest.raises(UserError, match="contains no .safetensors files"):
        write_records(folder.parent)


def test_write_records_rejects_too_many_bytes(folder, monkeypatch):
    monkeypatch.setattr("benchmarks.toyfaces.records.LIMIT", 1000)
    with pytest.raises(UserError, match="the package may ship at most 1000"):
        write_records(folder)


# --- the package's own ---------------------------------------------------------------------------------------------


def test_shipped_files_and_records_agree():
    root = ROOT / "src" / "psp_lightning" / "weights"
    assert locate.shipped_dir() == root
    records = {entry.file: entry for entry in locate.shipped().values()}
    # all files in the folder are shipped
    files = {file for file in root.rglob("*") if file.is_file() and file.name not in ("records.json", "README.md")}
    assert files == set(records), "run python -m benchmarks.toyfaces.records on the folder"
    for file, entry in records.items():
        content = file.read_bytes()
        assert entry.sha256 == hashlib.sha256(content).hexdigest(), f"{entry.name}: write the records again"
        assert entry.bytes == len(content) and entry.made_by and entry.licence, entry.name
        assert read_described(file, entry.kind)[0]["kind"] == entry.kind
    assert sum(entry.bytes for entry in records.values()) <= LIMIT


@torch.no_grad()
def test_shipped_networks_work():
    for name in [name for name, entry in locate.shipped().items() if entry.kind == "psp"]:
        net = PSP.from_pretrained(name)
        image = net(torch.zeros(1, net.encoder.in_channels, net.encoder.input_size, net.encoder.input_size))
        assert image.shape == (1, 3, net.generator.output_size, net.generator.output_size), name
        assert image.isfinite().all(), name


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_distributions_contain_the_weights(tmp_path, target):
    """Let hatchling list the files of a tree with weights, using the project's settings."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    for name in ("pyproject.toml", ".gitignore", "README.md", "LICENSE", "src/psp_lightning/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "conf").mkdir()
    weights = [f"psp_lightning/weights/toyfaces/{name}" for name in ("generator.safetensors", "records.json")]
    for name in weights:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"x")
    builder = {"wheel": WheelBuilder, "sdist": SdistBuilder}[target](str(tmp_path))
    held = {file.distribution_path for file in builder.recurse_included_files()}
    prefix = "src/" if target == "sdist" else ""
    assert {prefix + name for name in weights} <= held, f"the {target} does not contain the weights"

"""psp-weights as a user calls it."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from psp_lightning.checkpoints.weight_files import save_generator
from psp_lightning.loading import load_generator, load_psp
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.zoo import locate


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvidia = load("nvidia_pickles")


def generator() -> Generator:
    return Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=8).eval()


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    tensors = nvidia.from_published(generator().state_dict(), torch.ones(16))
    return nvidia.write(tmp_path / "my network=1.pkl", nvidia.snapshot(nvidia.network(tensors, clamp=256)))


@torch.no_grad()
def test_import_and_use(psp, tmp_path, pickled):
    result = psp("weights", "import", pickled, "out=new/g.safetensors")
    assert result.code == 0, result.err
    for text in (
        "NVIDIA StyleGAN2 pickle, G_ema",
        "32 px, 3 image channels, mapping of 2 layers, z 16, w 16, 8 styles",
        "the file's w_avg",
        "+-256",
        "matched",
        "note: its layers clamp",
        "generator.path=new/g.saf",
    ):
        assert text in result.out, f"{text!r} is not in\n{result.out}"
    net, average = load_generator(tmp_path / "new" / "g.safetensors")
    z = torch.randn(2, 16)
    assert torch.allclose(net(z), generator()(z), atol=1e-5) and torch.equal(average, torch.ones(16))

    again = psp("weights", "import", pickled, "out=new/g.safetensors")
    assert again.code == 1 and "exists already. overwrite=true" in again.err
    assert psp("weights", "import", pickled, "out=new/g.safetensors", "overwrite=true").code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["g.safetensors"]

    np.savez(tmp_path / "v.npz", z=z, image=generator()(z), w=generator().mapping(z))
    for form in (["--against", "v.npz"], ["--against=v.npz"], ["against=v.npz"]):
        result = psp("weights", "parity", "new/g.safetensors", *form)
        assert result.code == 0 and result.out.count("agrees") == 2, result
    np.savez(tmp_path / "v.npz", z=z, image=generator()(z) + 0.01)
    result = psp("weights", "parity", "new/g.safetensors", "against=v.npz")
    assert result.code == 1 and "DIFFERS" in result.out and "differ from the values in v.npz" in result.err
    assert psp("weights", "parity", "new/g.safetensors", "against=v.npz", "tolerance=0.1").code == 0


def test_a_released_network(psp, tmp_path):
    net = PSP(GradualStyleEncoder(8, 16, input_size=32, blocks=(1, 1, 1, 1), width=4), generator(), torch.ones(16))
    state = {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in net.generator.state_dict().items()}
    torch.save({"state_dict": state, "latent_avg": torch.ones(8, 16), "opts": {}}, tmp_path / "p.pt")
    result = psp("weights", "import", "p.pt", "out=p.safetensors", "in_channels=1", "licence=MIT")
    assert result.code == 0 and "adapted: its input channels" in result.out and "ckpt=p.safetensors" in result.out
    assert load_psp(tmp_path / "p.safetensors").source["kind"] == "sketch"
    result = psp("weights", "inspect", "p.safetensors")
    assert result.code == 0 and "GradualStyleEncoder, 1 channels of 32 px" in result.out and "MIT" in result.out
    result = psp("weights", "import", "p.pt", "out=g.safetensors", "what=generator", "latent_avg=computed")
    assert result.code == 0 and "not used: what=generator" in result.out and "100000 mapped draws" in result.out
    result = psp("weights", "verify", "p.safetensors")
    assert result.code == 0 and "no damage found" in result.out
    assert hashlib.sha256((tmp_path / "p.safetensors").read_bytes()).hexdigest() in result.out

    del state["encoder.latlayer1.bias"]
    torch.save({"state_dict": state, "latent_avg": torch.ones(8, 16), "opts": {}}, tmp_path / "p.pt")
    result = psp("weights", "import", "p.pt", "out=x.safetensors")
    assert result.code == 1 and "1 missing: encoder.latlayer1.bias" in result.err
    assert any("encoder.latlayer1" in line and "refused" in line for line in result.out.splitlines())
    assert not (tmp_path / "x.safetensors").exists()


def test_text_from_a_file_cannot_control_the_terminal(psp, tmp_path):
    """Control characters and lone surrogates are replaced in the output and in messages."""
    odd = "\x1b[2J\ud800\nx"
    save_generator(tmp_path / "g.safetensors", generator(), {odd: odd}, latent_avg=(torch.zeros(16), odd))
    result = psp("weights", "inspect", "g.safetensors")
    assert result.code == 0 and "?[2J??x" in result.out and "\x1b" not in result.out, result
    torch.save({odd: torch.ones(1)}, tmp_path / "k.pt")
    result = psp("weights", "inspect", "k.pt")
    assert result.code == 1 and "its keys are: ?[2J??x" in result.err and "\x1b" not in result.err, result


def test_verify_shipped(psp):
    for name, entry in locate.shipped().items():
        result = psp("weights", "verify", name)
        assert result.code == 0 and "as recorded in the package" in result.out and entry.sha256 in result.out, result


def test_list_get_verify(psp, tmp_path, monkeypatch):
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path / "w"))
    result = psp("weights", "list")
    assert result.code == 0
    for entry in locate.RECORDS.values():
        assert entry.name in result.out and entry.licence in result.out and entry.url in result.out
    for name in locate.shipped():
        assert name in result.out
    assert "[present]" not in result.out
    result = psp("weights", "get", "alexnet", "offline=true")
    assert result.code == 1 and "licence: BSD-3" in result.out and "By hand" in result.err
    assert "Did you mean 'alexnet'" in psp("weights", "get", "alexnett").err

    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    entry = locate.Record("mine", "w.pth", "http://127.0.0.1:9/w.pth", "MIT", "tests", digest[:8])
    monkeypatch.setitem(locate.RECORDS, "mine", entry)
    result = psp("weights", "verify", "w.pth")
    assert result.code == 0 and "as published" in result.out, result
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "w.pth").write_bytes(b"something else")
    result = psp("weights", "verify", "mine")
    assert result.code == 1 and "not the published file" in result.err
    (tmp_path / "w" / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes())
    assert psp("weights", "verify", "mine").code == 0 and "[present]" in psp("weights", "list").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["improt", "a"], "no 'improt'. Did you mean 'import'"),
        (["import", "g.safetensors"], "out=... must be given"),
        (["import", "out=x.safetensors"], "one file or name, not 0"),
        (["import", "a", "b", "out=x.safetensors"], "one file or name, not 2"),
        (["import", "g.safetensors", "out=x.pt"], "must end in .safetensors"),
        (["import", "none.pt", "out=x.safetensors"], "none.pt does not exist"),
        (["import", "g.safetensors", "out=x.safetensors", "what=decoder"], "what=decoder is unknown"),
        (["import", "g.safetensors", "out=x.safetensors", "label=two"], "label=two is not a whole number"),
        (["import", "g.safetensors", "out=x.safetensors", "label=2"], "takes no labels"),
        (["import", "g.safetensors", "out=x.safetensors", "in_channels=0"], "in_channels=0"),
        (["import", "g.safetensors", "out=x.safetensors", "laebl=2"], "Did you mean 'label'"),
        (["parity", "g.safetensors"], "against=... must be given"),
        (["parity", "g.safetensors", "--against"], "--against needs a value"),
        (["parity", "g.safetensors", "against=none.npz"], "none.npz does not exist"),
        (
            ["parity", "g.safetensors", "against=a.png", "seed=-1"],
            "seed=-1 must be a whole number, from 0 to",
        ),
        (["inspect", "."], "is a folder without a checkpoint"),
    ],
)
def test_mistakes(psp, tmp_path, arguments, message):
    save_generator(tmp_path / "g.safetensors", generator(), latent_avg=(torch.zeros(16), "given"))
    result = psp("weights", *arguments)
    assert result.code == 1 and message in result.err and "Traceback" not in result.err, result
    assert not (tmp_path / "x.safetensors").exists()


def test_other_generator_files_are_referred_to_the_command(psp, pickled):
    result = psp("train", "task=inversion", f"generator.path='{pickled}'", "generator=file", "trainer=cpu")
    assert result.code == 1 and "psp-weights import FILE out=" in result.err, result


def test_help(shell):
    result = shell("weights", "--help")
    assert result.code == 0 and "psp-weights import FILE out=" in result.out
    assert shell("weights").code == 1


@torch.no_grad()
def test_the_page_on_weights(psp, tmp_path, pickled):
    """Run the commands of docs/weights.md in their order, on files with the names it uses."""
    net = PSP(GradualStyleEncoder(8, 16, input_size=32, blocks=(1, 1, 1, 1), width=4), generator(), torch.ones(16))
    state = {f"encoder.{k}": v for k, v in net.encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in net.generator.state_dict().items()}
    torch.save({"state_dict": state, "latent_avg": torch.ones(8, 16), "opts": {}}, tmp_path / "psp.pt")
    torch.save({"g_ema": net.generator.state_dict(), "latent_avg": torch.ones(16)}, tmp_path / "stylegan2.pt")
    pickled.rename(tmp_path / "network-snapshot.pkl")
    z = torch.randn(2, 16)
    np.savez(tmp_path / "values.npz", z=z, w=generator().mapping(z), image=generator()(z))
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in page.split("```bash\n")[1].split("```")[0].splitlines()]
    assert len(lines) == 9
    for name, *arguments in lines:
        result = psp(name.removeprefix("psp-"), *arguments)
        assert result.code == 0, (arguments, result.err)
    for entry in locate.RECORDS.values():
        if entry.name.startswith(("psp_", "e4e_", "stylegan2_ada")):
            assert f"`{entry.name}`" in page and f"`{entry.filename}`" in page, f"{entry.name} is not on the page"

"""psp-export, psp-latents, and psp-predict with latents as input and output, as a user calls them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.checkpoints.weight_files import generator_hash, save_generator, save_psp
from psp_lightning.latents.files import read_latents
from psp_lightning.loading import load_psp
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Generator

QUIET = ["num_workers=0", "progress_bar=false", "accelerator=cpu"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write networks with different generators (mine, theirs), mine's generator (g) and a tree of three images (in)."""
    for seed, name in enumerate(("mine", "theirs")):
        torch.manual_seed(seed)
        generator = Generator.seeded(seed, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
        encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
        net = PSP(encoder, generator, torch.randn(16), source={"kind": "rgb", "size": 32})
        save_psp(tmp_path / f"{name}.safetensors", net, {"licence": "MIT"})
        if name == "mine":
            save_generator(tmp_path / "g.safetensors", generator, dtype=torch.float16)
    for i, folder in enumerate(("in", "in", "in/a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def predict(psp, **settings):
    return psp("predict", *(f"{key.replace('__', '.')}={value}" for key, value in settings.items()), *QUIET)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def same(a: Path, b: Path) -> bool:
    first, second = pixels(a), pixels(b)
    if first.keys() != second.keys():
        return False
    # another batch size may change the rounding by one level
    return all(np.abs(first[name].astype(int) - second[name]).max() <= 1 for name in first)


# --- latents of psp-predict


def test_latents_are_written_and_decoded(psp, place: Path) -> None:
    done = predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    assert done.code == 0, done.err
    file = place / "out" / "latents.safetensors"
    assert f"latents: {Path('out') / file.name}" in done.out
    found = read_latents(file)
    assert found.names == ("0", "1", "a/2") and found.space == "w_plus" and found.latent_avg
    net = load_psp(place / "mine.safetensors")
    assert found.generator == generator_hash(net.generator) and found.checkpoint == "mine.safetensors"
    with torch.no_grad():
        expected = net.generator.synthesis(found.codes)
    done = predict(psp, ckpt="mine.safetensors", input=file, output="again", latents="true", sheet="true")
    assert done.code == 0, done.err
    (place / "again" / "sheet.png").unlink()
    assert same(place / "out", place / "again"), "decoding the codes must give the image of the input"
    assert torch.equal(read_latents(place / "again" / file.name).codes, found.codes)
    assert expected.shape == (3, 3, 32, 32)
    lines = [json.loads(line) for line in (place / "again" / "manifest.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["0", "1", "a/2"]
    done = predict(psp, ckpt="g.safetensors", input=file, output="alone")
    assert done.code == 0, done.err
    first, second = pixels(place / "out"), pixels(place / "alone")
    worst = max(np.abs(first[name].astype(int) - second[name]).max() for name in first)
    assert worst <= 3, "a generator without an encoder must decode them, here with half-precision weights"


def test_latents_are_mixed_and_resized_like_images(psp, place: Path) -> None:
    predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    mix = {"mix__latent_mask": "[4,5,6,7]", "mix__n_outputs": 2, "resize": 16, "format": "png"}
    assert predict(psp, ckpt="mine.safetensors", input="in", output="a", **mix).code == 0
    done = predict(psp, ckpt="mine.safetensors", input="out/latents.safetensors", output="b", batch_size=1, **mix)
    assert done.code == 0, done.err
    assert same(place / "a", place / "b") and len(pixels(place / "b")) == 6
    reference = {"mix__latent_mask": "[4,5,6,7]", "mix__reference": "in/1.png"}
    assert predict(psp, ckpt="mine.safetensors", input="in", output="c", **reference).code == 0
    done = predict(psp, ckpt="mine.safetensors", input="out/latents.safetensors", output="d", **reference)
    assert done.code == 0 and same(place / "c", place / "d"), done.err
    done = predict(psp, ckpt="g.safetensors", input="out/latents.safetensors", output="e", **reference)
    assert done.code == 1 and "mix.reference needs an encoder" in done.err
    net = load_psp(place / "mine.safetensors")
    net.source = {}
    save_psp(place / "bare.safetensors", net)
    done = predict(psp, ckpt="bare.safetensors", input="out/latents.safetensors", output="f", **reference)
    assert done.code == 1 and "bare.safetensors does not say what its encoder takes" in done.err


def test_a_second_run_completes_the_file(psp, place: Path) -> None:
    predict(psp, ckpt="mine.safetensors", input="in/0.png", output="out", latents="true")
    assert read_latents(place / "out" / "latents.safetensors").names == ("0",)
    done = predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    assert done.code == 0 and "2 written, 1 skipped" in done.out, done.err
    assert read_latents(place / "out" / "latents.safetensors").names == ("0", "1", "a/2")
    (place / "out" / "latents" / "1.safetensors").unlink()
    assert "1 written, 2 skipped" in predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true").out
    (place / "out" / "latents" / "1.safetensors").unlink()
    done = predict(psp, ckpt="theirs.safetensors", input="in", output="out", latents="true")
    assert done.code == 1 and "another checkpoint, mine.safetensors" in done.err and "overwrite=true" in done.err


def test_an_unreadable_image_has_no_latent(psp, place: Path) -> None:
    (place / "in" / "0.png").write_bytes(b"no picture")
    done = predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    assert done.code == 1 and "1 failed" in done.out
    assert read_latents(place / "out" / "latents.safetensors").names == ("1", "a/2")


def test_latents_of_another_generator(psp, place: Path) -> None:
    predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    done = predict(psp, ckpt="theirs.safetensors", input="out/latents.safetensors", output="x")
    assert done.code == 1 and "mine.safetensors" in done.err and "theirs.safetensors" in done.err
    assert done.err.count("hash") == 2 and not pixels(place / "x")
    done = predict(psp, ckpt="theirs.safetensors", input="out/latents.safetensors", output="x", any_generator="true")
    assert done.code == 0 and len(pixels(place / "x")) == 3, done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side_by_side": "true"}, "side_by_side is for images"),
        ({"factor": 2}, "factor is for images"),
        ({"mask__composite": "true"}, "mask is for images"),
        ({"latents": "npz"}, "true, false or safetensors"),
        ({"any_generator": 3}, "true or false"),
        ({"input": "gone.safetensors"}, "do not exist"),
        ({"input": "mine.safetensors"}, "of kind 'psp', not 'latents'"),
        ({"input": "w.npy"}, "psp-latents in=w.npy"),
        ({"output": "out", "latents": "true"}, "latents.safetensors is an input and would be overwritten"),
    ],
)
def test_mistakes_with_latents(settings: dict, message: str, psp, place: Path) -> None:
    predict(psp, ckpt="mine.safetensors", input="in/0.png", output="out", latents="true")
    np.save(place / "w.npy", np.zeros((2, 16), np.float32))
    settings = {"ckpt": "mine.safetensors", "input": "out/latents.safetensors", "output": "x"} | settings
    done = predict(psp, **settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err


# --- psp-latents


def test_codes_for_other_tools_and_back(psp, place: Path) -> None:
    predict(psp, ckpt="mine.safetensors", input="in", output="out", latents="true")
    codes = read_latents(place / "out" / "latents.safetensors").codes
    done = psp("latents", "in=out/latents.safetensors", "out=latents.pt")
    assert done.code == 0 and "(3, 8, 16)" in done.out, done.err
    assert torch.equal(torch.load(place / "latents.pt", weights_only=True), codes)
    assert psp("latents", "in=out/latents.safetensors", "out=one.pt", "name=a/2").code == 0
    assert torch.equal(torch.load(place / "one.pt", weights_only=True), codes[2:])
    assert psp("latents", "in=out/latents.safetensors", "out=wp.npy").code == 0
    np.save(place / "edited.npy", np.load(place / "wp.npy") + 0.5)
    (place / "names.txt").write_text("0\n1\na/2\n")
    done = psp("latents", "in=edited.npy", "out=edited.safetensors", "ckpt=g.safetensors", "names=names.txt")
    assert done.code == 0, done.err
    done = predict(psp, ckpt="mine.safetensors", input="edited.safetensors", output="edited")
    assert done.code == 0 and pixels(place / "edited").keys() == pixels(place / "out").keys(), done.err


def test_z_and_w_codes_give_the_same_images(psp, place: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 16)
    np.save(place / "z.npy", z.numpy())
    net = load_psp(place / "mine.safetensors")
    with torch.no_grad():
        w = net.generator.mapping(z)
    assert psp("latents", "in=z.npy", "space=z", "into=w", "out=w.npy", "ckpt=mine.safetensors").code == 0
    assert np.allclose(np.load(place / "w.npy"), w.numpy(), atol=1e-5)
    for space, extra in (("z", ["space=z"]), ("w", [])):
        done = psp("latents", f"in={space}.npy", f"out={space}.safetensors", "ckpt=mine.safetensors", *extra)
        assert done.code == 0, done.err
        assert predict(psp, ckpt="mine.safetensors", input=f"{space}.safetensors", output=f"from_{space}").code == 0
    assert same(place / "from_z", place / "from_w")
    assert pixels(place / "from_z").keys() == {"00000.png", "00001.png"}


def test_codes_without_the_average(psp, place: Path) -> None:
    net = load_psp(place / "mine.safetensors")
    torch.save(torch.zeros(1, 8, 16), place / "delta.pt")
    done = psp("latents", "in=delta.pt", "out=delta.safetensors", "ckpt=mine.safetensors", "latent_avg=excluded")
    assert done.code == 0 and not read_latents(place / "delta.safetensors").latent_avg, done.err
    assert predict(psp, ckpt="mine.safetensors", input="delta.safetensors", output="out").code == 0
    with torch.no_grad():
        image = net.decode(net.latent_avg[None])[0].clamp(-1, 1) * 127.5 + 127.5
    assert np.abs(pixels(place / "out")["00000.png"] - image.permute(1, 2, 0).numpy()).max() <= 1
    assert psp("latents", "in=delta.safetensors", "out=full.pt", "ckpt=mine.safetensors").code == 0
    assert torch.equal(torch.load(place / "full.pt", weights_only=True)[0], net.latent_avg)
    done = psp("latents", "in=delta.safetensors", "out=full2.pt")
    assert done.code == 1 and "ckpt=" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in=wp.npy", "out=x.safetensors"], "Give ckpt=..."),
        (["in=gone.npy", "out=x.pt"], "gone.npy do not exist"),
        (["in=in", "out=x.pt"], "in are a folder, not a file"),
        (["in=wp.npy", "out=x.txt"], "must end in"),
        (["in=wp.npy", "out=wp.npy"], "overwrite=true"),
        (["in=wp.npy"], "out=... must be given"),
        (["in=wp.npy", "out=x.pt", "spaec=w"], "Did you mean 'space'?"),
        (["in=wp.npy", "out=x.pt", "into=W"], "into=W is unknown"),
        (["in=wp.npy", "out=x.safetensors", "ckpt=mine.safetensors", "names=gone.txt"], "gone.txt"),
        (["in=wp.npy", "out=x.safetensors", "ckpt=wp.npy"], "wp.npy"),
        (["in=bad.npy", "out=x.safetensors", "ckpt=mine.safetensors"], "do not fit"),
        (["in=wp.npy", "out=x.safetensors", "ckpt=mine.safetensors", "any_generator=maybe"], "any_generator=maybe"),
    ],
)
def test_mistakes_of_psp_latents(arguments: list[str], message: str, psp, place: Path) -> None:
    np.save(place / "wp.npy", np.zeros((2, 8, 16), np.float32))
    np.save(place / "bad.npy", np.zeros((2, 18, 512), np.float32))
    done = psp("latents", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err
    assert not list(place.glob("x.*"))


# --- psp-export


@pytest.mark.filterwarnings("ignore")
def test_export_for_onnxruntime(psp, place: Path) -> None:
    onnxruntime = importlib.import_module("onnxruntime")
    done = psp("export", "ckpt=mine.safetensors", "out=new/net.onnx")
    assert done.code == 0 and "net.onnx.md" in done.out, done.err
    assert "licence: MIT" in (place / "new" / "net.onnx.md").read_text()
    net, session = load_psp(place / "mine.safetensors"), onnxruntime.InferenceSession(place / "new" / "net.onnx")
    for batch in (1, 3):
        x = torch.rand(batch, 3, 32, 32)
        with torch.no_grad():
            expected = net(x).numpy()
        assert np.abs(session.run(["image"], {"source": x.numpy()})[0] - expected).max() < 1e-3
    done = psp("export", "ckpt=mine.safetensors", "out=new/net.onnx")
    assert done.code == 1 and "overwrite=true" in done.err
    assert psp("export", "ckpt=mine.safetensors", "out=new/net.onnx", "overwrite=true", "what=encoder").code == 0
    assert psp("export", "ckpt=g.safetensors", "out=g.pt", "what=generator", "format=torchscript").code == 0
    assert psp("export", "ckpt=mine.safetensors", "out=copy.safetensors").code == 0
    assert predict(psp, ckpt="copy.safetensors", input="in/0.png", output="out").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=mine.safetensors"], "out=... must be given"),
        (["out=x.onnx"], "ckpt=... must be given"),
        (["ckpt=mine.safetensors", "out=x.onnx", "format=onx"], "Did you mean 'onnx'?"),
        (["ckpt=mine.safetensors", "out=x.onnx", "format=torchscript"], "must end in .pt"),
        (["ckpt=mine.safetensors", "out=x.onnx", "what=decoder"], "what=decoder is unknown"),
        (["ckpt=mine.safetensors", "out=x.tflite"], ".onnx or .pt or .safetensors"),
        (["ckpt=mine.safetensors", "out=in"], "must end in"),
        (["ckpt=gone.pt", "out=x.onnx"], "gone.pt does not exist"),
        (["ckpt=in/0.png", "out=x.onnx"], "0.png"),
        (["ckpt=g.safetensors", "out=x.onnx"], "what=generator"),
        (["ckpt=mine.safetensors", "out=x.safetensors", "what=encoder"], "what=both"),
        (["ckpt=mine.safetensors", "out=in/0.png/x.onnx"], "0.png"),
        (["ckpt=mine.safetensors", "out=x.onnx", "plugins=no_such_module"], "no_such_module"),
    ],
)
def test_mistakes_of_psp_export(arguments: list[str], message: str, psp, place: Path) -> None:
    done = psp("export", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err
    assert not list(place.glob("x.*")) and not list(place.glob(".*"))


def test_missing_packages(psp, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def hidden(name: str, *rest):
        return None if name.startswith("onnx") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    done = psp("export", "ckpt=mine.safetensors", "out=x.onnx")
    assert done.code == 1 and "pip install onnx onnxruntime" in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["export", "latents"])
def test_help(command: str, psp, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = psp(command, "--help")
    assert shown.code == 0 and f"psp-{command}" in shown.out
    module = importlib.import_module(f"psp_lightning.cli.{command}")
    for name in module.DEFAULTS:
        assert re.search(rf"\b{name}\b", shown.out), f"--help does not mention {name}"
    assert psp(command).code == 1

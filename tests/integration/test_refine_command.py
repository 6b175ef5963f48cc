"""psp-predict with embed and refine: inputs of every kind, two ranks, and latents that are written and read back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from psp_lightning import PSP
from psp_lightning.checkpoints.weight_files import save_generator
from psp_lightning.models.psp import PSP as Network
from psp_lightning.models.refiner import FeatureRefiner
from psp_lightning.zoo.locate import find_shipped as find

FAST = ["accelerator=cpu", "num_workers=0", "progress_bar=false"]
CHOICES = {
    "none": ["refine=none"],
    "features": ["refine=features"],
    "optimised codes": ["refine=optimize", "refine.steps=2"],
    "optimised features": ["refine=optimize", "refine.space=features", "refine.start=features", "refine.steps=2"],
    "weights": ["refine=optimize", "refine.space=weights", "refine.steps=2"],
}
ONE_STYLE = ["refine=optimize", "refine.space=w", "refine.start=average", "refine.steps=2"]
EMBED = {
    "encoder": [],
    "optimised": ["embed=optimize", "embed.steps=2"],
    "one style": ["embed=optimize", "embed.steps=2", "embed.space=w"],
}
PAIRS = [("encoder", refine) for refine in CHOICES] + [("one style", "features"), ("encoder", "one style")]
PAIRS += [pytest.param("optimised", refine, marks=pytest.mark.slow) for refine in CHOICES]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def faces(psp, tmp_path: Path) -> Path:
    """Write a refined network, `net.ckpt`, and three faces; return the folder of the faces."""
    plain = PSP.from_pretrained("toyfaces/inversion")
    torch.manual_seed(0)
    refiner = FeatureRefiner(16, plain.generator.feature_channels[16], 64, width=16, blocks=1)
    torch.nn.init.normal_(refiner.change.weight, std=0.1)
    net = Network(plain.encoder, plain.generator, plain.latent_avg, source=plain.source, refiner=refiner)
    content = {"psp": net.describe(), "state_dict": {f"net.{key}": value for key, value in net.state_dict().items()}}
    torch.save(content, tmp_path / "net.ckpt")
    assert psp("data", "toyfaces", "out=data", "n=3", "size=64").code == 0
    return tmp_path / "data" / "CelebA-HQ-img"


@pytest.mark.parametrize(("embed", "refine"), PAIRS)
def test_latents_give_the_same_image(psp, faces: Path, tmp_path: Path, embed: str, refine: str) -> None:
    settings = ["ckpt=net.ckpt", *FAST, *EMBED[embed], *(CHOICES | {"one style": ONE_STYLE})[refine]]
    done = psp("predict", *settings, f"input={faces}", "output=out", "latents=true")
    assert done.code == 0 and "3 written" in done.out, done.err
    done = psp("predict", *settings, f"input={faces / '1.jpg'}", "output=one")
    assert done.code == 0 and "1 written" in done.out, done.err
    assert np.abs(pixels(tmp_path / "one" / "1.png") - pixels(tmp_path / "out" / "1.png")).max() <= 1
    codes = load_file(tmp_path / "out" / "latents.safetensors")["w_plus"]
    assert torch.equal(codes, codes[:, :1].expand_as(codes)) == ("one style" in (embed, refine))
    if refine == "one style":
        assert (codes - PSP.from_pretrained("toyfaces/inversion").latent_avg).abs().max() < 0.3, "two small steps"
    stored = refine not in ("none", "optimised codes", "one style")
    assert (tmp_path / "out" / "refinements" / "1.safetensors").is_file() == stored
    for source in ("out/latents.safetensors", "out/latents/1.safetensors"):
        done = psp("predict", "ckpt=net.ckpt", *FAST, f"input={source}", "output=again", "overwrite=true")
        assert done.code == 0, done.err
        assert np.abs(pixels(tmp_path / "again" / "1.png") - pixels(tmp_path / "out" / "1.png")).max() <= 1
    done = psp("predict", *settings, f"input={faces}", "output=out", "latents=true")
    assert "3 skipped" in done.out, "the second call finds all files"
    if refine == "features":
        mix = ["ckpt=net.ckpt", *FAST, "mix.latent_mask=[6,7]"]
        assert psp("predict", *settings, *mix, f"input={faces}", "output=mixed").code == 0
        assert psp("predict", *mix, "input=out/latents.safetensors", "output=mixed again").code == 0
        mixed = pixels(tmp_path / "mixed" / "1.png")
        assert np.abs(pixels(tmp_path / "mixed again" / "1.png") - mixed).max() <= 1
        assert np.abs(pixels(tmp_path / "out" / "1.png") - mixed).max() > 4


@pytest.mark.parametrize(("refine", "steps"), [("features", []), ("weights", ["refine.steps=10"])])
def test_the_same_image_in_bfloat16(psp, faces: Path, tmp_path: Path, refine: str, steps: list[str]) -> None:
    """The image is made from the numbers that the files contain, so that both calls round alike."""
    settings = ["ckpt=net.ckpt", *FAST, "precision=bf16", "batch_size=1"]
    images = [f"input={faces}", "output=out", "latents=true", *CHOICES[refine], *steps]
    assert psp("predict", *settings, *images).code == 0
    assert psp("predict", *settings, "input=out/latents.safetensors", "output=again").code == 0
    for name in ("0.png", "1.png", "2.png"):
        assert np.abs(pixels(tmp_path / "again" / name) - pixels(tmp_path / "out" / name)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("embed", "refine"), [*(("encoder", refine) for refine in CHOICES), ("optimised", "none")])
def test_two_ranks_write_the_same_files(shell, faces: Path, tmp_path: Path, embed: str, refine: str) -> None:
    for devices in (1, 2):
        settings = [*FAST, *EMBED[embed], *CHOICES[refine], f"devices={devices}", "latents=true", "batch_size=1"]
        done = shell("predict", "ckpt=net.ckpt", f"input={faces}", f"output=out{devices}", *settings)
        assert done.code == 0, done.err
    files = sorted(path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "out2") for path in (tmp_path / "out2").rglob("*.*"))
    latents = ["input=out1/latents.safetensors", "devices=2", "batch_size=1", *FAST]
    done = shell("predict", "ckpt=net.ckpt", *latents, "output=again")
    assert done.code == 0, done.err
    for file in files:
        if file.suffix == ".png":
            assert np.abs(pixels(tmp_path / "again" / file) - pixels(tmp_path / "out1" / file)).max() <= 1
            assert np.abs(pixels(tmp_path / "out1" / file) - pixels(tmp_path / "out2" / file)).max() <= 1
        if file.suffix == ".safetensors":
            one, two = (load_file(tmp_path / out / file) for out in ("out1", "out2"))
            assert one.keys() == two.keys()
            for key, tensor in one.items():
                torch.testing.assert_close(two[key].float(), tensor.float(), rtol=1e-2, atol=1e-3)


def test_a_generator_is_enough_to_optimise(psp, faces: Path, tmp_path: Path) -> None:
    net = PSP.from_pretrained("toyfaces/inversion")
    save_generator(tmp_path / "g.safetensors", net.generator, {}, latent_avg=(net.latent_avg, "test"))
    settings = ["ckpt=g.safetensors", f"input={faces}", *FAST]
    done = psp("predict", *settings, "output=out", "embed=optimize", "embed.steps=3")
    assert done.code == 0 and "3 written" in done.out, done.err
    done = psp("predict", *settings, "output=other", "refine=optimize", "refine.steps=3")
    assert done.code == 1 and "With embed=optimize embed.start=average, a generator is enough" in done.err, done.err


def test_a_refinement_of_weights_is_half_precision(psp, faces: Path, tmp_path: Path) -> None:
    settings = ["refine=optimize", "refine.space=weights", "refine.steps=1", "latents=true"]
    assert psp("predict", "ckpt=net.ckpt", f"input={faces / '0.jpg'}", "output=out", *FAST, *settings).code == 0
    path = tmp_path / "out" / "refinements" / "0.safetensors"
    with safe_open(path, "pt") as file:
        n = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  it is not a dict
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        facts = json.loads(file.metadata()["psp_lightning"])
    assert path.stat().st_size < 2 * n + 20_000 and len(facts["generator"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ckpt=toyfaces/inversion", "refine=features"], "this network has no refiner"),
        (["ckpt=toyfaces/superres", "refine=optimize"], "toyfaces/superres is for lowres images"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "refine.seconds=0"], "refine.seconds=0 must be more than 0"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "refine.space=z"], "refine.space=z is unknown"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "refine.space=features", "refine.resolution=24"],
         "refine.resolution=24 must be one of the generator's: 4, 8, 16, 32, 64"),
        (["ckpt=net.ckpt", "refine=optimize", "refine.space=features", "refine.start=features", "refine.resolution=8"],
         "refine.resolution=8 must be the refiner's, 16, with start=features"),
        (["ckpt=toyfaces/inversion", "embed=optimize", "+embed.resolution=16", "embed.space=features"],
         "embed.space=features must be w_plus or w"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "compile=true"], "compile=true cannot be used with refine"),
        (["ckpt=toyfaces/inversion", "refine=optimise"], "Did you mean"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "precision=16-mixed"], "too coarse for the gradients"),
        (["ckpt=toyfaces/inversion", "embed=optimize", "refine=optimize", "refine.start=average"], "would discard"),
        (["ckpt=net.ckpt", "embed=optimize", "embed.start=features"], "embed.start=features must be average"),
        (["ckpt=toyfaces/inversion", "refine=optimize", "refine.losses={l2: 0}"], "No loss is selected"),
        (["ckpt=toyfaces/inversion", "refinements=dir"], "refinements=dir has no effect here"),
    ],
)  # fmt: skip
def test_mistakes(psp, faces: Path, settings: list[str], message: str) -> None:
    done = psp("predict", f"input={faces}", "output=out", *FAST, *settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err


def test_refinements_that_do_not_fit(psp, faces: Path, tmp_path: Path) -> None:
    refine = ["refine=features", "latents=true"]
    assert psp("predict", "ckpt=net.ckpt", f"input={faces}", "output=out", *FAST, *refine).code == 0
    (tmp_path / "out" / "refinements" / "1.safetensors").unlink()
    latents = ["ckpt=net.ckpt", "input=out/latents.safetensors", *FAST]
    done = psp("predict", *latents, "output=again")
    assert done.code == 1 and "2 written" in done.out and "1 failed" in done.out, done.out
    assert "out/refinements/1.safetensors does not exist" in done.err and "refine=none" in done.err
    assert psp("predict", *latents, "output=codes", "refine=none").code == 0
    done = psp("predict", *latents, "output=third", "refine=optimize")
    assert done.code == 1 and "refine is for images" in done.err
    other = tmp_path / "out" / "refinements" / "0.safetensors"
    content = other.read_bytes()
    digest = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["psp_lightning"]
    changed = content.replace(json.loads(digest)["generator"]["sha256"].encode(), b"0" * 64)
    assert changed != content
    other.write_bytes(changed)
    done = psp("predict", *latents, "output=fourth")
    assert done.code == 1 and "0.safetensors belongs to another generator (hash 0000000000000000" in done.err


def test_changed_refinements_are_decoded_again(psp, faces: Path, tmp_path: Path) -> None:
    assert psp("predict", "ckpt=net.ckpt", f"input={faces}", "output=out", "latents=true", *FAST).code == 0
    latents = ["ckpt=net.ckpt", "input=out/latents.safetensors", "output=again", *FAST]
    file, aside = tmp_path / "out" / "refinements" / "1.safetensors", tmp_path / "aside"
    file.rename(aside)
    assert "2 written, 0 skipped, 1 failed" in psp("predict", *latents).out
    aside.rename(file)
    assert "1 written, 2 skipped" in psp("predict", *latents).out, "only the one that was missing"
    assert "3 skipped" in psp("predict", *latents).out
    os.utime(file, ns=(0, 0))
    assert "1 written, 2 skipped" in psp("predict", *latents).out
    file.unlink()
    done = psp("predict", *latents)
    assert done.code == 1 and "2 skipped" in done.out and "1 failed" in done.out, done.out


def test_refinements_of_codes_in_w(psp, faces: Path, tmp_path: Path) -> None:
    one = ["refine=optimize", "refine.space=features", "refine.steps=1", "embed=optimize", "embed.space=w"]
    settings = ["ckpt=net.ckpt", f"input={faces}", "latents=true", *FAST, *one]
    for name, n in (("a", 1), ("b", 2)):
        assert psp("predict", *settings, f"output={name}", f"embed.steps={n}").code == 0
        done = psp("latents", f"in={name}/latents.safetensors", "into=w", "ckpt=net.ckpt", f"out={name}/w.safetensors")
        assert done.code == 0, done.err
    latents = ["ckpt=net.ckpt", "input=a/w.safetensors", *FAST]
    assert psp("predict", *latents, "output=same").code == 0
    assert np.abs(pixels(tmp_path / "same" / "0.png") - pixels(tmp_path / "a" / "0.png")).max() <= 1
    shutil.copytree(tmp_path / "b" / "refinements", tmp_path / "a" / "refinements", dirs_exist_ok=True)
    done = psp("predict", *latents, "output=other")
    assert done.code == 1 and "written with another code" in done.err, done.err


def test_an_output_folder_named_latents(psp, faces: Path, tmp_path: Path) -> None:
    assert psp("predict", "ckpt=net.ckpt", f"input={faces}/0.jpg", "output=latents", "latents=true", *FAST).code == 0
    done = psp("predict", "ckpt=net.ckpt", "input=latents/latents.safetensors", "output=again", *FAST)
    assert done.code == 0, done.err


def test_codes_in_folders_and_of_another_run(psp, faces: Path, tmp_path: Path) -> None:
    """Each code finds its own refinement, below folders too, and no refinement of another code."""
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for name in ("0.jpg", "sub/1.jpg"):
        (tmp_path / "tree" / name).write_bytes((faces / Path(name).name).read_bytes())
    settings = ["ckpt=net.ckpt", *FAST, "latents=true"]
    assert psp("predict", *settings, "input=tree", "output=out").code == 0
    for source, name in (("out/latents.safetensors", "sub/1"), ("out/latents/sub/1.safetensors", "sub/1")):
        done = psp("predict", "ckpt=net.ckpt", *FAST, f"input={source}", "output=again", "overwrite=true")
        assert done.code == 0, done.err
        assert np.abs(pixels(tmp_path / "again" / f"{name}.png") - pixels(tmp_path / "out" / f"{name}.png")).max() <= 1
    optimised = ["refine=optimize", "refine.space=features", "refine.steps=1", "embed=optimize", "embed.steps=1"]
    assert psp("predict", *settings, "input=tree", "output=other", *optimised).code == 0
    shutil.copytree(tmp_path / "other" / "refinements", tmp_path / "out" / "refinements", dirs_exist_ok=True)
    done = psp("predict", "ckpt=net.ckpt", *FAST, "input=out/latents.safetensors", "output=mixed")
    assert done.code == 1 and "written with another code" in done.err and "2 failed" in done.out
    given = ["refinements=out/refinements", "output=edited"]
    assert psp("predict", "ckpt=net.ckpt", *FAST, "input=out/latents.safetensors", *given).code == 0
    done = psp("latents", "in=out/latents.safetensors", "out=codes.npy")
    assert done.code == 0 and "codes.npy has only the codes" in done.err


def test_outputs_that_are_not_finite(psp, faces: Path, tmp_path: Path) -> None:
    settings = ["refine=optimize", "refine.steps=3", "refine.lr=1e30", "latents=true"]
    done = psp("predict", "ckpt=toyfaces/inversion", f"input={faces}", "output=out", *FAST, *settings)
    assert done.code == 1 and "3 failed" in done.out and "not finite" in done.err and "Traceback" not in done.err
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_refusal_names_the_settings_that_differ(psp, faces: Path) -> None:
    command = ["predict", "ckpt=toyfaces/inversion", f"input={faces / '0.jpg'}", "output=out", *FAST]
    assert psp(*command).code == 0
    assert "was made with resize=null, not resize=32." in psp(*command, "resize=32").err
    assert "was made with other settings of refine." in psp(*command, "refine=none", "resize=32").err
    both = ["refine=optimize", "refine.steps=1", "embed=optimize"]
    assert "was made with other settings of embed and refine and loss." in psp(*command, *both).err


def test_another_network_of_a_loss_is_not_skipped(psp, faces: Path, tmp_path: Path) -> None:
    settings = ["refine=optimize", "refine.steps=1", "refine.losses.perceptual=0.1", f"input={faces / '0.jpg'}"]
    assert psp("predict", "ckpt=toyfaces/inversion", "output=out", *FAST, *settings).code == 0
    (tmp_path / "mine.safetensors").write_bytes(find("toyfaces/identity").read_bytes())
    done = psp(
        "predict", "ckpt=toyfaces/inversion", "output=out", *FAST, *settings, "loss.perceptual.weights=mine.safetensors"
    )
    assert done.code == 1 and "exist already and may differ" in done.err, done.out

"""psp-train-generator: from a folder of images to a generator file for psp-train; resume, ranks, mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from psp_lightning.data.image_sets import FolderImages
from psp_lightning.lit.callbacks.samples import sample_images
from psp_lightning.loading import load_generator
from psp_lightning.models.stylegan2 import Generator

NETWORK = [
    "network.style_dim=32",
    "network.z_dim=32",
    "network.n_mapping=2",
    "network.channel_base=256",
    "network.max_channels=32",
]
SMALL = [
    *NETWORK,
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "data.num_workers=0",
    "data.batch_size=8",
    "callbacks.images=null",
]
CPU = ["trainer=cpu", *SMALL]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the images of `psp-data toyfaces n=256 size=32` and return their folder."""
    out = tmp_path_factory.mktemp("faces")
    command = [sys.executable, "-m", "psp_lightning.cli.data", "toyfaces", f"out={out}", "n=256", "size=32"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out / "CelebA-HQ-img"


def rows(run: Path, *, timing: bool = True) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open() as file:
        content = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if timing or k != "train/images_per_second"} for row in content]


def final(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]
    return a == b


# --- from a folder to a generator to pSp


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run 200 steps, and keep the image grid and the export of its first steps."""
    place = tmp_path_factory.mktemp("trained")
    settings = [item for item in CPU if item not in ("callbacks.images=null", "trainer.log_every_n_steps=1")]
    command = [sys.executable, "-m", "psp_lightning.cli.train_generator", f"data.root={faces}", *settings, "run=faces"]
    command += ["trainer.max_steps=200", "trainer.log_every_n_steps=20", "callbacks.export.every_n_steps=100"]
    command += ["data.cache=true", "data.name=my faces", "data.licence=MIT", "callbacks.images.every_n_steps=100"]
    command += ["callbacks.images.n_images=16", "model.augment=none"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "done: step 200" in done.stdout + done.stderr
    return place / "runs" / "generator" / "faces"


@pytest.mark.slow
def test_losses_are_finite_and_each_row_is_a_step(trained: Path) -> None:
    table = rows(trained)
    assert [int(row["step"]) for row in table] == list(range(20, 201, 20))
    for row in table:
        assert all(torch.isfinite(torch.tensor(float(value))) for value in row.values()), row
    assert float(table[-1]["train/images"]) == 1600
    state = final(trained)
    assert state["global_step"] == 200, "a step of both networks counts as one step"
    assert {int(o["state"][0]["step"]) for o in state["optimizer_states"]} == {200 + 50, 200 + 13}


@pytest.mark.slow
def test_samples_approach_the_data(trained: Path, faces: Path) -> None:
    data = FolderImages(faces)
    real = torch.stack([data[i]["image"] for i in range(len(data))])
    torch.manual_seed(0)

    def differences(generator: Generator) -> tuple[float, float, float]:
        fake = sample_images(generator, 128)
        mean = (fake.mean((0, 2, 3)) - real.mean((0, 2, 3))).abs().max().item()
        deviation = (fake.std((0, 2, 3)) - real.std((0, 2, 3))).abs().max().item()
        return mean, deviation, (fake.mean(0) - real.mean(0)).square().mean().sqrt().item()

    generator, _ = load_generator(trained / "generator.safetensors")
    start, end = differences(Generator.seeded(0, **generator.config)), differences(generator)
    for name, before, after, bound in zip(
        ("mean", "deviation", "mean image"), start, end, (0.15, 0.15, 0.25), strict=True
    ):
        assert after < bound and after < 0.6 * before, f"{name} of the samples: {before:.3f} before, {after:.3f} after"


@pytest.mark.slow
def test_the_average_changes_and_is_exported(trained: Path) -> None:
    state = final(trained)["state_dict"]
    generator, average = load_generator(trained / "generator.safetensors")
    early, _ = load_generator(trained / "generator_00000100.safetensors")
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, state[f"g_ema.{name}"]), name
    weights = [name for name, _ in generator.named_parameters()]
    moved = [name for name in weights if not torch.equal(generator.state_dict()[name], early.state_dict()[name])]
    assert moved == weights
    assert any(not torch.equal(state[f"g_ema.{name}"], state[f"generator.{name}"]) for name in weights)
    assert torch.equal(average, generator.latent_average(100_000, 0))


@pytest.mark.slow
def test_the_file_describes_itself(trained: Path) -> None:
    with safe_open(trained / "generator.safetensors", "pt") as file:
        description = json.loads(file.metadata()["psp_lightning"])
    network = description["generator"]
    assert (network["output_size"], network["style_dim"], network["n_mapping"]) == (32, 32, 2)
    assert (network["image_channels"], network["channel_base"], network["max_channels"]) == (3, 256, 32)
    assert description["kind"] == "generator" and description["value_range"] == [-1, 1]
    assert description["origin"] == {
        "data": "my faces", "licence": "MIT", "seed": 0, "steps": 200, "images_shown": 1600,
    }  # fmt: skip


@pytest.mark.slow
def test_the_run_directory(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {
        "checkpoints", "config.yaml", "csv", "generator.safetensors", "images", "overrides.yaml", "train.log",
    }  # fmt: skip
    grids = sorted((trained / "images").iterdir())
    assert [path.name for path in grids] == ["samples_00000100.png", "samples_00000200.png"]
    assert Image.open(grids[0]).size == (4 * 32, 4 * 32)


@pytest.mark.slow
def test_psp_trains_on_it(trained: Path, psp, tiny: list[str]) -> None:
    file = trained / "generator.safetensors"
    sizes = ["domain.input_size=32", "domain.target_size=32", "loss=[l2]"]
    done = psp("train", "generator=file", f"generator.path={file}", *sizes, *tiny, "run=on_it")
    assert done.code == 0, done.err
    from psp_lightning import PSP

    net = PSP.from_checkpoint("runs/inversion/on_it")
    w_plus = net.encode(torch.zeros(1, 3, 32, 32))
    assert w_plus.shape == (1, 8, 32) and net.decode(w_plus).shape == (1, 3, 32, 32)
    mine = load_generator(file)[0].state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in net.generator.state_dict().items())


@pytest.mark.slow
def test_a_new_run_starts_from_it(trained: Path, faces: Path, psp, tmp_path: Path) -> None:
    """The file gives the generator and its average; the run gives all networks."""
    still = [f"data.root={faces}", *CPU, "trainer.max_steps=1", "optimizer.lr=0"]
    file = trained / "generator.safetensors"
    for name, source in (("file", file), ("run", trained)):
        done = psp("train_generator", *still, f"init_from={source}", f"run={name}")
        assert done.code == 0, done.err
    exported = load_generator(file)[0].state_dict()
    from_file, from_run = (final(tmp_path / "runs" / "generator" / name)["state_dict"] for name in ("file", "run"))
    whole = final(trained)["state_dict"]
    for key, tensor in exported.items():
        assert torch.equal(from_file[f"generator.{key}"], tensor) and torch.equal(from_file[f"g_ema.{key}"], tensor)
    for key in whole:
        if key.startswith(("generator.", "discriminator.")):
            assert torch.equal(from_run[key], whole[key]), key
    assert int(from_run["images_shown"]) == 8, "a new run must count from 0"
    done = psp("train_generator", *still, f"init_from={file}", "network.max_channels=16", "run=other")
    assert done.code == 1 and f"init_from={file} is a generator of another shape" in done.err, done.err
    done = psp("train_generator", *still, f"init_from={trained}", "network.z_dim=16", "run=other")
    assert done.code == 1 and done.err.count("\n") == 1 and "networks do not match" in done.err, done.err


# --- resume


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "psp_lightning.cli.train_generator", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    log, deadline = run / "csv" / "metrics.csv", time.time() + 240
    while not (log.exists() and log.read_text().count("\n") > step):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "the log stopped growing"
        time.sleep(0.02)


# 20 images in batches of 8: an epoch has two steps, so step 9 is in the middle of one and step 10 at its end
@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize(("every", "ranks"), [(9, 1), (10, 1), (9, 2)])
def test_resume_is_bit_exact(every: int, ranks: int, faces: Path, tmp_path: Path) -> None:
    kind = ["trainer=cpu"] if ranks == 1 else ["trainer=ddp_cpu", "data.batch_size=4"]
    settings = [f"data.root={faces}", "data.limit=20", "data.flip=true", *SMALL, *kind, "trainer.max_steps=24"]
    settings += [f"callbacks.last.every_n_steps={every}", "model.ada_images=2000", "model.augment_p=0.1"]
    whole = start(tmp_path, *settings, "run=whole")
    cut = start(tmp_path, *settings, "run=cut")
    cut_run, whole_run = (tmp_path / "runs" / "generator" / name for name in ("cut", "whole"))
    wait_for_step(cut, cut_run, every + 2)
    os.kill(cut.pid, signal.SIGKILL)
    cut.communicate()
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out
    assert 0 < final(cut_run)["global_step"] < 24
    again = start(tmp_path, "resume=auto" if ranks == 1 else f"resume={cut_run}", "run=cut")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    a, b = final(whole_run), final(cut_run)
    assert a["global_step"] == b["global_step"] == 24
    for key in ("state_dict", "optimizer_states"):
        assert equal(a[key], b[key]), f"{key} differs after the resume"
    assert rows(whole_run, timing=False) == rows(cut_run, timing=False), "metrics.csv differs after the resume"
    assert [int(row["step"]) for row in rows(cut_run)] == list(range(1, 25))
    files = [(run / "generator.safetensors").read_bytes() for run in (whole_run, cut_run)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_ctrl_c_keeps_everything_and_prints_the_resume_command(faces: Path, psp, tmp_path: Path) -> None:
    process = start(tmp_path, f"data.root={faces}", *CPU, "trainer.max_steps=100000", "run=long")
    run = tmp_path / "runs" / "generator" / "long"
    wait_for_step(process, run, 3)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "continue with: psp-train-generator resume=" in out and "Traceback" not in out, out
    step = final(run)["global_step"]
    assert len(rows(run)) == step and (run / "generator.safetensors").is_file()
    done = psp("train_generator", f"resume={run}", f"trainer.max_steps={step + 2}")
    assert done.code == 0, done.err
    assert final(run)["global_step"] == step + 2
    done = psp("train_generator", f"resume={run}", f"trainer.max_steps={step + 2}")
    assert done.code == 0 and "already at step" in done.out + done.err


@pytest.mark.slow
def test_resume_rejects_changed_settings(faces: Path, psp, tmp_path: Path) -> None:
    settings = [f"data.root={faces}", *CPU, "trainer.max_steps=1", "run=a"]
    done = psp("train_generator", *settings)
    assert done.code == 0 and ", 1 step of " in done.out, done.out + done.err
    run = tmp_path / "runs" / "generator" / "a"
    done = psp("train_generator", *settings)
    assert done.code == 1 and "contains a run already" in done.err
    for change in ("network.max_channels=16", "model.mixing=0", "optimizer.lr=0.1", "seed=1"):
        done = psp("train_generator", f"resume={run}", change, "trainer.max_steps=2")
        assert done.code == 1 and change.split("=")[0] in done.err and "init_from=" in done.err, done.err
    # without the recorded settings, the shapes of the weights reveal the mismatch
    (tmp_path / "x").mkdir()
    (run / "checkpoints" / "last.ckpt").rename(tmp_path / "x" / "a.ckpt")
    settings = [item for item in settings if not item.startswith(("run=", "network.max_channels", "trainer.max_steps"))]
    wrong = [*settings, "network.max_channels=16", "trainer.max_steps=2", "run=b"]
    done = psp("train_generator", "resume=x/a.ckpt", *wrong)
    assert done.code == 1 and "networks do not match network.* and domain.size" in done.err, done.err
    assert "Traceback" not in done.err


# --- several ranks


@pytest.mark.serial
@pytest.mark.slow
def test_two_ranks_agree_with_one(faces: Path, tmp_path: Path) -> None:
    """Two ranks with batches of 4 see the images, latents, noise and groups of one process with batches of 8.

    The sums over the batch have another order. Adam divides by the gradient's size, so a weight whose gradient is
    only rounding error (StyleGAN's mapping network at the start) changes by up to lr in any direction.
    """
    settings = [f"data.root={faces}", *SMALL, "trainer.max_steps=6", "model.augment=fixed", "model.augment_p=0.5"]
    one = start(tmp_path, *settings, "trainer=cpu", "run=one")
    two = start(tmp_path, *settings, "trainer=ddp_cpu", "data.batch_size=4", "run=two")
    for process in (one, two):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    runs = [tmp_path / "runs" / "generator" / name for name in ("one", "two")]
    a, b = (final(run) for run in runs)
    assert a["global_step"] == b["global_step"] == 6
    assert a["state_dict"]["images_shown"] == b["state_dict"]["images_shown"] == 48
    for key, tensor in a["state_dict"].items():
        difference = (tensor.double() - b["state_dict"][key].double()).abs()
        assert difference.max() < 1e-3 and difference.mean() < 2e-5, f"{key}: {difference.max():.1e}"
    for mine, theirs in zip(*(rows(run, timing=False) for run in runs), strict=True):
        for key in mine:
            assert float(mine[key]) == pytest.approx(float(theirs[key]), abs=1e-3), f"{key} at step {mine['step']}"


# --- augmentation


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model.augment=ada", "model.ada_target=-1"], [0.0, 0.016, 0.032]),
        (["model.augment=ada", "model.augment_p=0.02", "model.ada_target=1"], [0.02, 0.004, 0.0]),
        (["model.augment=fixed", "model.augment_p=0.3"], [0.3, 0.3, 0.3]),
        (["model.augment=none", "model.augment_p=0.3"], [0.0, 0.0, 0.0]),
    ],
    ids=["up", "down", "fixed", "none"],
)
def test_augmentation_probability(settings: list[str], expected: list[float], faces: Path, psp, tmp_path: Path) -> None:
    """The probability changes by 32 / 2000 every 4 steps of 8 images."""
    done = psp(
        "train_generator", f"data.root={faces}", *CPU, *settings, "model.ada_images=2000", "trainer.max_steps=9",
        "run=a", "network.max_channels=8", "data.limit=16", "model.path_every=0", "model.r1_every=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    table = rows(tmp_path / "runs" / "generator" / "a")
    p = [float(row["train/augment_p"]) for row in table]
    assert [p[0], p[4], p[8]] == pytest.approx(expected, abs=1e-6)
    assert p[0] == p[3] and p[4] == p[7]
    assert "train/r1" not in table[0] and "train/path_length" not in table[0]


@pytest.mark.parametrize("half", ["bfloat16", "none"])
def test_half_precision_trains(half: str, faces: Path, psp, tmp_path: Path) -> None:
    settings = [f"data.root={faces}", *CPU, f"model.half={half}", "model.half_blocks=2", "trainer.max_steps=2"]
    done = psp("train_generator", *settings, "run=a")
    assert done.code == 0, done.err
    state = final(tmp_path / "runs" / "generator" / "a")["state_dict"]
    assert {t.dtype for key, t in state.items() if key != "images_shown"} == {torch.float32}


# --- data


def test_fitted_images_of_all_kinds(psp, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "LA", "1")):
        Image.new(mode, (20 + i, 30 - i)).save(folder / f"{i}.png")
    Image.new("CMYK", (25, 25)).save(folder / "6.jpg")
    Image.new("I;16", (25, 25), 30000).save(folder / "7.png")
    settings = ["data.root=mixed", *CPU, "data.batch_size=4", "trainer.max_steps=2"]
    done = psp("train_generator", *settings, "run=a")
    assert done.code == 1 and "data.fit=squash, pad or crop" in done.err, done.err
    done = psp("train_generator", *settings, "run=a", "data.fit=pad", "domain.size=16")
    assert done.code == 0, done.err
    (folder / "8.png").write_bytes(b"no image")
    done = psp("train_generator", *settings, "run=b", "data.fit=pad", "domain.size=16")
    assert done.code == 1 and "8.png cannot be read as an image" in done.err and done.err.count("\n") == 1, done.err


def test_a_file_damaged_after_its_header(faces: Path, psp, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes((faces / f"{i}.jpg").read_bytes())
    (folder / "3.jpg").write_bytes((faces / "3.jpg").read_bytes()[:700])
    done = psp("train_generator", "data.root=broken", *CPU, "trainer.max_steps=2", "run=a")
    assert done.code == 1 and "Cannot read image broken/3.jpg" in done.err and "Traceback" not in done.err, done.err


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["modle.half=none"], ["modle.half", "Did you mean 'model.half'"]),
        (["data.batch_sise=3"], ["data.batch_sise", "Did you mean 'data.batch_size'"]),
        (["network=tofaces"], ["network=tofaces", "Did you mean 'toyfaces'", "auto"]),
        (["model.augment=foo"], ["model.augment=foo", "none, fixed, ada"]),
        (["+model.foo=1"], ["model.foo"]),
        (["model.half=fp16"], ["model.half=fp16", "bfloat16"]),
        (["model.mixing=2"], ["model.mixing=2", "from 0 to 1"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.max_steps=null"], ["trainer.max_steps"]),
        (["+trainer.precision=bf16-mixed"], ["trainer.precision", "model.half"]),
        (["+trainer.accumulate_grad_batches=2"], ["trainer.accumulate_grad_batches", "data.batch_size"]),
        (["trainer.strategy=fsdp"], ["trainer.strategy=fsdp", "auto or ddp"]),
        (["optimizer=ranger"], ["Adam"]),
        (["optimizer.betas=[0]"], ["optimizer.betas"]),
        (["data.root=nowhere"], ["nowhere", "does not exist"]),
        (["data.root=null"], ["data.root=DIR"]),
        (["data.fit=crpo", "domain.size=16"], ["data.fit=crpo", "Did you mean 'crop'"]),
        (["domain.size=48"], ["domain.size=48", "power of two"]),
        (["data.batch_size=300"], ["256 images", "300", "data.batch_size=256"]),
        (["init_from=nowhere"], ["nowhere", "does not exist"]),
        (["resume=nowhere"], ["resume=nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_mistakes_are_one_line(arguments: list[str], words: list[str], faces: Path, psp) -> None:
    done = psp("train_generator", f"data.root={faces}", *CPU, "trainer.max_steps=1", *arguments)
    assert done.code == 1
    lines = [line for line in done.err.splitlines() if "[INFO]" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    for word in words:
        assert word in lines[0], done.err


def test_no_data(psp) -> None:
    done = psp("train_generator", "trainer=cpu")
    words = "Set data.root=DIR, the folder with the training images, or use domain=toyfaces."
    assert done.code == 1 and done.err == f"error: {words}\n"


def test_domains_of_psp_train(psp) -> None:
    done = psp("train_generator", "domain=ffhq", "trainer=cpu", "data.root=x", "generator.path=y")
    assert done.code == 1 and "Choose from: domain=folder, toyfaces" in done.err, done.err


def test_torchrun_with_other_devices(faces: Path, psp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = psp("train_generator", f"data.root={faces}", *CPU, "trainer.max_steps=1")
    assert done.code == 1 and "torchrun started 2 processes" in done.err and "trainer.devices asks for 1" in done.err


def test_a_loss_that_is_not_finite_stops_the_run(faces: Path, psp) -> None:
    done = psp("train_generator", f"data.root={faces}", *CPU, "optimizer.lr=1e30", "trainer.max_steps=4", "run=a")
    assert done.code == 1 and "became" in done.err and "optimizer.lr" in done.err, done.err


def test_a_run_says_how_long_it_will_take(faces: Path, psp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psp_lightning.lit.callbacks.Forecast.steps", 1)
    monkeypatch.setattr("psp_lightning.lit.callbacks.forecast.LONG", 0)
    done = psp("train_generator", f"data.root={faces}", *CPU, "trainer.max_steps=3", "run=a")
    assert done.code == 0 and "step 2 of 3: about " in done.out and "network=toyfaces" in done.out, done.err


@pytest.mark.serial
def test_help_and_settings_are_shown(shell) -> None:
    begun = time.monotonic()
    shown = shell("train_generator", "--help")
    assert shown.code == 0 and "psp-train-generator data.root=photos" in shown.out, shown.err
    shown = shell("train_generator", "--cfg", "job", "domain=toyfaces")
    assert shown.code == 0 and "minibatch_group: 4" in shown.out, shown.err
    assert time.monotonic() - begun < 60

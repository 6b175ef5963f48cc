"""The engine of psp-evaluate: the same numbers for any split, and the summaries and files made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from psp_lightning.data.image_pairs import ImagePairs
from psp_lightning.inference.optimize import Optimizer
from psp_lightning.lit.evaluation import Given, LitEvaluator, Network, collate_images, share
from psp_lightning.lit.results import (
    choose,
    delete_results,
    failure,
    load_results,
    markdown,
    save_results,
    save_table,
    summary,
    table,
)
from psp_lightning.losses.perceptual import PerceptualLoss
from psp_lightning.metrics import METRICS
from psp_lightning.metrics.features import DomainFrechet, DomainKernel
from psp_lightning.metrics.networks import Perceptual
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import UserError

SPLITS = [(n, size) for n in (1, 2, 37) for size in (1, 3, 8)]


def items(n: int) -> list[dict]:
    generator = torch.Generator().manual_seed(n)
    target = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    output = target + 0.3 * torch.randn(n, 3, 32, 32, generator=generator)
    return [{"output": output[i], "target": target[i], "index": i} for i in range(n)]


def evaluate(n: int, size: int, rank: int = 0, world: int = 1):
    """Measure `n` pairs in batches of `size`, or this rank's share; return what `results` returns."""
    network = PerceptualLoss()
    metrics = {name: METRICS[name]() for name in ("mse", "psnr", "ssim")}
    metrics |= {"perceptual": Perceptual(network.distance), "frechet": DomainFrechet(), "kernel": DomainKernel()}
    module = LitEvaluator(Given(), metrics, network)
    pairs, mine = items(n), share(n, size, rank, world)
    for start in range(0, len(mine), size):
        module.predict_step(collate_images([pairs[i] for i in mine[start : start + size]]), 0)
    return module.results(n)


def numbers(found) -> list[float]:
    per_image, single, *_ = found
    return [value for name in per_image for value in per_image[name]] + list(single.values())


@pytest.fixture(scope="module")
def alone() -> dict[int, object]:
    return {n: evaluate(n, 1) for n in (1, 2, 37)}


@pytest.mark.parametrize(("n", "size"), [split for split in SPLITS if split[1] > 1])
def test_batches_do_not_change_the_numbers(alone, n: int, size: int) -> None:
    found = evaluate(n, size)
    assert numbers(found) == pytest.approx(numbers(alone[n]), rel=1e-9)
    assert found[2] == alone[n][2]
    assert (set(found[2]) == {"frechet", "kernel"}) == (n == 1), "one image is no set"


def _rank(rank: int, port: int, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {(n, size): evaluate(n, size, rank, 2) for n, size in SPLITS if n > size}  # otherwise one rank has no batch
    if rank == 0:
        results.update(found)
    dist.destroy_process_group()


@pytest.mark.serial
def test_ranks_do_not_change_the_numbers(alone) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (port, results), nprocs=2)
        found = dict(results)
    assert set(found) == {(2, 1), (37, 1), (37, 3), (37, 8)}
    for (n, size), two in found.items():
        assert numbers(two) == pytest.approx(numbers(alone[n]), rel=1e-9), (n, size)


@pytest.mark.parametrize(("n", "size"), SPLITS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_belongs_to_one_rank(n: int, size: int, world: int) -> None:
    shares = [share(n, size, rank, world) for rank in range(world)]
    assert sorted(index for mine in shares for index in mine) == list(range(n))
    batches = {tuple(mine[i : i + size]) for mine in shares for i in range(0, len(mine), size)}
    assert batches == {tuple(range(i, min(i + size, n))) for i in range(0, n, size)}, "the batches of one rank"


def test_images_are_compared_as_8_bits_or_as_floats() -> None:
    half = torch.full((3, 4, 4), 0.4 / 127.5)  # less than half a level
    item = {"output": half, "target": torch.zeros(3, 4, 4), "index": 0}
    values = []
    for rounded in (True, False):
        module = LitEvaluator(Given(), {"mse": METRICS["mse"]()}, torch.nn.Identity(), rounded)
        module.predict_step(collate_images([item]), 0)
        values.append(module.values["mse"][0])
    assert values[0] == 0 and values[1] == pytest.approx((0.4 / 127.5) ** 2)


def test_a_metric_that_fails_leaves_the_others(alone) -> None:
    class Broken(METRICS["mse"]):  # type: ignore[misc]
        def per_image(self, y_hat, y):
            raise UserError("it broke")

    class TooSmall(METRICS["mse"]):  # type: ignore[misc]
        def per_image(self, y_hat, y):
            return torch.nn.functional.conv2d(y_hat, torch.zeros(1, 3, 99, 99))

    class Endless(DomainKernel):
        def compute(self):
            return torch.tensor(math.inf)

    broken = {"broken": Broken(), "small": TooSmall(), "endless": Endless()}
    module = LitEvaluator(Given(), {**broken, "mse": METRICS["mse"]()}, torch.nn.Identity())
    for item in items(2):
        module.predict_step(collate_images([item]), 0)
    per_image, single, errors, _ = module.results(2)
    assert per_image == {"mse": alone[2][0]["mse"]} and single == {}
    assert errors["broken"] == "it broke" and "kernel size" in errors["small"].lower()
    assert errors["endless"] == "the value is inf, not a finite number."


def test_an_output_that_is_not_finite_ends_the_evaluation() -> None:
    """Rounded to 8 bits it would be a picture, and as floats the mean would leave it out."""
    (item,) = items(1)
    item["output"][0, 0, 0] = math.nan
    module = LitEvaluator(Given(), {"mse": METRICS["mse"]()}, torch.nn.Identity())
    with pytest.raises(UserError, match="output for a.png has values that are not finite"):
        module.predict_step(collate_images([{**item, "path": "a.png"}]), 0)


def test_a_metric_says_what_the_images_lack() -> None:
    module = LitEvaluator(Given(), {"consistency": METRICS["consistency"]()}, torch.nn.Identity())
    module.predict_step(collate_images(items(1)), 0)
    assert "it needs source, factor of each image" in module.results(1)[2]["consistency"]


# --- summaries


def test_summary() -> None:
    x = np.random.default_rng(1).gamma(2, 3, 400)
    found = summary(x.tolist())
    assert found["mean"] == pytest.approx(x.mean(), rel=1e-12) and found["median"] == np.median(x)
    error = x.std(ddof=1) / math.sqrt(len(x))
    assert found["low"] == pytest.approx(x.mean() - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(x.mean() + 1.96 * error, abs=0.2 * error)
    assert summary(x.tolist()) == found != summary(x.tolist(), seed=1)
    assert summary([2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "median": 2.0, "n_images": 1}
    found = summary([1.0, math.nan, 3.0])
    assert (found["mean"], found["n_images"]) == (2.0, 2)
    with pytest.raises(ValueError, match="no image"):
        summary([math.nan])
    with pytest.raises(ValueError, match="infinite for 1 of 2 images"):
        summary([math.inf, math.nan, 3.0])


def test_summary_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).random(50).tolist()
    whole = summary(x)
    monkeypatch.setattr("psp_lightning.lit.results.BLOCK", 1000)
    assert summary(x) == whole, "the draws depend on the number of values only"


def test_choose() -> None:
    values = [5.0, math.nan, 1.0, 4.0, 2.0, 3.0, 1.0]
    assert choose(values, True, 2) == {"best": [0, 3], "median": [4, 5][::-1], "worst": [2, 6]}
    assert choose(values, False, 1) == {"best": [2], "median": [4], "worst": [0]}
    assert choose([1.0], True, 3) == {"best": [0], "median": [], "worst": []}
    assert choose(values, True, 0) == {"best": [], "median": [], "worst": []}
    assert sorted(sum(choose(list(range(5)), True, 3).values(), [])) == [0, 1, 2, 3, 4]


def record(name: str, **metrics: dict) -> dict:
    rows = {
        key: {"mean": 1.0, "low": None, "high": None, "median": None, "better": "lower", "unit": "", "convention": "",
              "n_images": 2, "missing": {}, "error": None, **value}
        for key, value in metrics.items()
    }  # fmt: skip
    return {"name": name, "n_images": 2, "seconds_per_image": None, "peak_memory_mib": None, "metrics": rows}


def test_files(tmp_path: Path) -> None:
    columns = {"mse": [0.1, math.nan]}
    save_results(tmp_path, {"format": 1}, ["a,b.png", "\udcff.png"], columns)
    assert load_results(tmp_path) == {"format": 1}
    lines = (tmp_path / "per_image.csv").read_bytes().splitlines()
    assert lines == [b"index,name,mse", b'0,"a,b.png",0.1', b"1,\\udcff.png,"]
    assert {path.name for path in tmp_path.iterdir()} == {"per_image.csv", "metrics.json"}


def test_results_of_an_earlier_evaluation_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    (folder / "images").mkdir(parents=True)
    kept = [tmp_path / "target.png", folder / "images" / "mine.png"]
    gone = [folder / "images" / "000001_output.png", folder / "report.html"]
    for path in (*kept, *gone):
        path.touch()
    entry = {"source": None, "target": "../target.png", "output": "images/000001_output.png"}
    save_results(folder, {"images": {"shown": [entry]}}, [], {})
    delete_results(folder)
    assert all(path.exists() for path in kept), "only files of the evaluation, whatever metrics.json names"
    assert sorted(path.name for path in folder.rglob("*")) == ["images", "mine.png"]
    (folder / "metrics.json").write_text("junk")
    delete_results(folder)
    assert not (folder / "metrics.json").exists()


def test_table_of_several_evaluations(tmp_path: Path) -> None:
    first = record("a|b", psnr={"mean": 20.0, "low": 19.0, "high": 21.0, "unit": "dB"})
    second = record("c", psnr={"mean": None, "unit": "dB", "error": "x"}, frechet={"mean": 3.5})
    rows = table([first, second])
    assert rows[0][:4] == ["name", "images", "psnr, dB", "frechet"]
    assert rows[1][2:4] == ["20 [19, 21]", ""] and rows[2][2:4] == ["not measured", "3.5"]
    assert save_table(tmp_path, [first, second]) == markdown(rows) == (tmp_path / "table.md").read_text()
    assert "a\\|b" in markdown(rows)
    head, one, two = (line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines())
    assert one[0] == "a|b" and one[head.index("error")] == ""
    assert one[head.index("psnr_low")] == "19.0" and two[head.index("psnr_mean")] == ""
    broken = failure("d", "no weights,\n  no result")
    rows = table([second, broken])
    assert rows[0][-1] == "error" and rows[1][-1] == "" and rows[2] == ["d", *[""] * 5, "no weights, no result"]
    assert table([broken]) == [["name", "images", *rows[0][-3:]], ["d", *[""] * 3, "no weights, no result"]]
    assert table([record("a", mse={"n_images": 1})])[1][2] == "1, 1 of 2"


# --- pairs of images


def write(folder: Path, **sizes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        Image.new("RGB", (size, size), (10, 20, 30)).save(folder / f"{name}.png")
    return folder


def test_image_pairs(tmp_path: Path) -> None:
    outputs, targets = write(tmp_path / "out", a=8, b=16), write(tmp_path / "in", b=16, a=8)
    pairs = ImagePairs(outputs, targets)
    assert pairs.names() == ["a.png", "b.png"]
    assert pairs[1]["output"].shape == (3, 16, 16) and pairs[1]["index"] == 1
    torch.testing.assert_close((pairs[0]["output"][:, 0, 0] + 1) * 127.5, torch.tensor([10.0, 20.0, 30.0]))


def test_image_pairs_of_different_sizes(tmp_path: Path) -> None:
    outputs, targets = write(tmp_path / "out", a=8), write(tmp_path / "in", a=16)
    with pytest.raises(UserError, match=r"8 x 8 pixels, but its target .*a.png has 16 x 16. size=N"):
        ImagePairs(outputs, targets)[0]
    assert ImagePairs(outputs, targets, size=12)[0]["output"].shape == (3, 12, 12)


def test_image_pairs_without_a_counterpart(tmp_path: Path) -> None:
    outputs, targets = write(tmp_path / "out", a=8), write(tmp_path / "in", a=8, b=8)
    with pytest.raises(UserError, match="^Outputs in .* 1 target without an output: b.png") as error:
        ImagePairs(outputs, targets)
    assert "data.unpaired" not in str(error.value), "there is no such setting"
    with pytest.raises(UserError, match="contain no images"):
        ImagePairs(write(tmp_path / "empty"), targets)
    with pytest.raises(UserError, match="targets=.*none is not a folder"):
        ImagePairs(outputs, tmp_path / "none")


# --- optimisation


@pytest.fixture(scope="module")
def net() -> PSP:
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator

    generator = Generator.seeded(0, output_size=32, style_dim=16, n_mapping=2, max_channels=12)
    torch.manual_seed(0)
    encoder = GradualStyleEncoder(8, style_dim=16, input_size=32, blocks=(1, 1, 1, 1), width=4)
    return PSP(encoder, generator, generator.latent_average(n=64), source={"kind": "rgb", "size": 32}).eval()


def squared(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y_hat - y).square().flatten(1).mean(1)


@pytest.mark.parametrize("space", ["w", "w_plus"])
@pytest.mark.parametrize("start", ["encoder", "average"])
def test_optimizer_comes_closer(net: PSP, space: str, start: str) -> None:
    torch.manual_seed(1)
    images = torch.nn.functional.adaptive_avg_pool2d(net.decode(net.latent_avg + torch.randn(2, 8, 16)), 16)
    images = images.detach()
    with torch.no_grad():  # as an evaluation calls it
        w_plus = net.encode(torch.zeros(2, 3, 32, 32))
        codes = Optimizer(squared, space, start, steps=20, lr=0.05)(net, Inversion(w_plus), images).w_plus
    first = w_plus if start == "encoder" else net.latent_avg.expand_as(w_plus)
    if space == "w":
        first = first.mean(1, keepdim=True).expand_as(first)
        assert (codes == codes[:, :1]).all()
    pooled = [torch.nn.functional.adaptive_avg_pool2d(net.decode(code), 16) for code in (first, codes)]
    before, after = (squared(image, images) for image in pooled)
    assert (after < before).all() and not codes.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_json_has_no_special_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save_results(tmp_path, {"value": math.nan}, [], {})
    assert not (tmp_path / "metrics.json").exists()
    save_results(tmp_path, {"value": None}, [], {})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"value": None}


@pytest.mark.parametrize("size", [3, 8])
def test_a_network_in_the_loop(net: PSP, size: int) -> None:
    """Batches of other sizes may round an output to the next of the 256 levels."""

    def measure(size: int) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(37, 3, 32, 32, generator=generator) * 2 - 1
        module = LitEvaluator(
            Network(net), {name: METRICS[name]() for name in ("mse", "psnr", "ssim")}, torch.nn.Module()
        )
        for start in range(0, 37, size):
            part = range(start, min(start + size, 37))
            module.predict_step(
                collate_images([{"source": images[i], "target": images[i], "index": i} for i in part]), 0
            )
        per_image = module.results(37).per_image
        return [sum(values) / 37 for values in per_image.values()]

    assert measure(size) == pytest.approx(measure(1), rel=1e-4)

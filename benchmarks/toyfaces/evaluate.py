"""Measure the toy domain: `python -m benchmarks.toyfaces.evaluate [--only PART ...]`.

Parts: samples (grids), frechet, projection, checkpoints (the shipped encoders on 1,000 held-out faces), mixing,
ablation (`--ablation FOLDER` of `psp-train -m 'experiment=glob(toyfaces_ablation_*)'`), training (`--generator RUN` of
psp-train-generator: samples and Frechet distance after increasing numbers of steps). Results are merged into
benchmarks/results/toyfaces.json, pictures are written to docs/, and the table of the encoders is printed as markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.toyfaces.faces import HELD_OUT, Faces, draw
from benchmarks.toyfaces.train_parser import kinds
from psp_lightning import PSP
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.inference.frozen import freeze_generator
from psp_lightning.inference.projection import project
from psp_lightning.lit.callbacks.samples import sample_images, tile
from psp_lightning.loading import load_embedding, load_generator
from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.losses.perceptual import PerceptualLoss
from psp_lightning.metrics.frechet import FrechetDistance
from psp_lightning.models.face_parser import KINDS
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.images import save_atomic, to_pil
from psp_lightning.zoo.locate import shipped

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "toyfaces.json"
TASKS = ("inversion", "sketch2face", "seg2face", "superres")
BATCH = 16  # images per step of the generator's training
ABLATION = ("w", "w_plus", "gradual", "gradual_id")  # the order of the paper's table


class Scores:
    """MSE, PSNR, perceptual distance and identity similarity between outputs and targets."""

    def __init__(self) -> None:
        self.perceptual = PerceptualLoss("toyfaces/identity")
        self.identity = load_embedding("toyfaces/identity").eval()

    @torch.no_grad()
    def __call__(self, output: Tensor, target: Tensor) -> dict[str, float]:
        output = output.clamp(-1, 1)
        mse = mse_per_image(output, target)
        psnr = 10 * torch.log10(4 / mse.clamp_min(1e-10))
        similarity = (self.identity(output) * self.identity(target)).sum(1)
        return {
            "mse": float(mse.mean()),
            "psnr": float(psnr.mean()),
            "psnr_median": float(psnr.median()),
            "perceptual": float(self.perceptual.distance(output, target).mean()),
            "id_similarity": float(similarity.mean()),
            "images": len(output),
        }


def samples() -> dict[str, Any]:
    """Draw grids of 8 x 8 samples with truncation 0.7 and 1.0."""
    generator, _ = load_generator("toyfaces/generator")
    for psi in (0.7, 1.0):
        grid = tile(sample_images(generator, 64, psi), 8)
        save_atomic(to_pil(grid), ROOT / "docs" / f"toyfaces_samples_{psi}.png", optimize=True)
    return {}


@torch.no_grad()
def generate(generator: Generator, n: int) -> Iterator[Tensor]:
    """Generate `n` samples without truncation, 50 at a time, from fixed latents and noise."""
    torch.manual_seed(0)
    for _ in range(0, n, 50):
        yield generator(torch.randn(50, generator.z_dim), noise="random")


def frechet(n: int = 10_000) -> dict[str, Any]:
    """Measure the Frechet distance of generated to drawn faces, and of two disjoint drawn sets."""
    generator, _ = load_generator("toyfaces/generator")
    embedding = load_embedding("toyfaces/identity").eval()
    generated, drawn = (FrechetDistance(embedding.statistics, sum(embedding.config["widths"])) for _ in range(2))
    for start in range(0, n, 500):
        real = draw(HELD_OUT, 500, start).images
        generated.update(real, real=True)
        drawn.update(real, real=True)
        drawn.update(draw(HELD_OUT + 1, 500, start).images, real=False)
    for images in generate(generator, n):
        generated.update(images, real=False)
    return {"images": n, "generated": float(generated.compute()), "drawn": float(drawn.compute())}


def training(run: Path, n: int = 2000, shown: Sequence[int] = (1000, 3000, 6000, 10_000, 17_000)) -> dict[str, Any]:
    """Measure the generators that a run exported during training, and draw the same eight latents with each of them."""
    embedding = load_embedding("toyfaces/identity").eval()
    distance = FrechetDistance(embedding.statistics, sum(embedding.config["widths"]))
    distance.update(draw(HELD_OUT, n).images, real=True)
    rows, grid = [], []
    for file in sorted(run.glob("generator_*.safetensors")):
        steps = int(file.stem.removeprefix("generator_"))
        if steps > max(shown):
            continue
        generator, _ = load_generator(file)
        distance.fake = []
        for images in generate(generator, n):
            distance.update(images, real=False)
        rows.append({"steps": steps, "images": steps * BATCH, "frechet": float(distance.compute())})
        if steps in shown:
            grid.append(sample_images(generator, 8, 0.7))
    save_atomic(to_pil(tile(torch.cat(grid), 8)), ROOT / "docs" / "toyfaces_training.png", optimize=True)
    return {"images": n, "exports": rows}


def projection(n: int = 64, steps: int = 500) -> dict[str, Any]:
    """Optimise W+ codes of held-out faces: the upper limit of any encoder."""
    generator, average = load_generator("toyfaces/generator")
    assert average is not None
    perceptual, scores = PerceptualLoss("toyfaces/identity"), Scores()
    targets = draw(HELD_OUT, n).images

    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        return mse_per_image(y_hat, y) + 0.1 * perceptual.distance(y_hat, y)

    start = time.perf_counter()
    w_plus = project(freeze_generator(generator), targets, average, distance, steps, lr=0.2)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        output = generator.synthesis(w_plus)
    pairs = torch.stack([targets[:16], output[:16]], 1).flatten(0, 1)
    save_atomic(to_pil(tile(pairs, 8)), ROOT / "docs" / "toyfaces_projection.png", optimize=True)
    return {**scores(output, targets), "steps": steps, "ms_per_image": 1000 * seconds / n}


def sources(net: PSP, faces: Faces, task: str) -> Tensor:
    """Return the inputs of the task's encoder for drawn faces."""
    if task == "inversion":
        return faces.images
    if task == "sketch2face":
        return faces.sketches
    spec = InputSpec.from_dict(net.source)
    if task == "seg2face":
        from PIL import Image

        return torch.stack([load_source(Image.fromarray(labels), spec) for labels in faces.labels])
    import numpy as np

    lows = [
        load_source(to_pil(image), spec, rng=np.random.default_rng([HELD_OUT, i]))
        for i, image in enumerate(faces.images)
    ]
    return torch.stack(lows)


@torch.no_grad()
def measure(net: PSP, task: str, faces: Faces, scores: Scores) -> tuple[dict[str, Any], Tensor]:
    """Return scores and outputs of a network; the time is the median of 50 runs with one image each."""
    source = sources(net, faces, task)
    output = torch.cat([net(part) for part in source.split(50)])
    times = []
    for i in range(60):
        start = time.perf_counter()
        net(source[i % len(source)][None])
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in net.encoder.parameters())
    ms = 1000 * sorted(times[10:])[25]
    return {**scores(output, faces.images), "ms_per_image": ms, "encoder_parameters": parameters}, output


def checkpoints(n: int = 1000) -> dict[str, Any]:
    """Measure each shipped encoder on held-out faces."""
    faces, scores, rows = draw(HELD_OUT, n), Scores(), {}
    for task in TASKS:
        net = PSP.from_pretrained(f"toyfaces/{task}")
        rows[task], output = measure(net, task, faces, scores)
        source = sources(net, faces, task)[:8]
        shown = faces.images[:8] if source.shape[1] > 3 else (source if task != "sketch2face" else source * 2 - 1)
        if task == "seg2face":
            from psp_lightning.data.labels import colourise

            colours = [torch.from_numpy(colourise(labels)).permute(2, 0, 1) / 127.5 - 1 for labels in faces.labels[:8]]
            shown = torch.stack(colours)
        rows_of_images = torch.cat([shown.expand(-1, 3, -1, -1), output[:8], faces.images[:8]])
        save_atomic(to_pil(tile(rows_of_images, 8)), ROOT / "docs" / f"toyfaces_{task}.png", optimize=True)
    return rows


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Return the intersection over union, counted over all pixels of all images, averaged over classes."""
    shares = []
    for kind in range(len(KINDS)):
        a, b = predicted == kind, labels == kind
        shares.append(float((a & b).sum() / (a | b).sum().clamp_min(1)))
    return sum(shares) / len(shares)


@torch.no_grad()
def mixing(n: int = 32, outputs: int = 8, first: int = 4) -> dict[str, Any]:
    """Mix random styles into sketches from layer `first` on; measure agreement with the label map, and variety."""
    net = PSP.from_pretrained("toyfaces/sketch2face")
    generator, _ = load_generator("toyfaces/generator")
    faces = draw(HELD_OUT, n)
    parser = load_embedding("toyfaces/parser")
    truth = kinds(faces.labels)
    random = torch.Generator().manual_seed(0)
    w_plus, layers = net.encode(faces.sketches), range(first, net.n_styles)
    mixed = []
    for _ in range(outputs):
        style = generator.mapping(torch.randn(n, generator.z_dim, generator=random))
        mixed.append(net.decode(net.mix_styles(w_plus, style, layers)).clamp(-1, 1))
    stack = torch.stack(mixed)  # (outputs, n, 3, S, S)
    label_maps = parser.regions(stack.flatten(0, 1))
    plain = parser.regions(net.decode(w_plus).clamp(-1, 1))
    drawn = parser.regions(faces.images)
    pairs = [(stack[i] - stack[j]).abs().mean() for i in range(outputs) for j in range(i)]
    rows = torch.cat(
        [torch.cat([faces.sketches[i : i + 1].expand(-1, 3, -1, -1) * 2 - 1, stack[:7, i]]) for i in range(6)]
    )
    save_atomic(to_pil(tile(rows, 8)), ROOT / "docs" / "toyfaces_mixing.png", optimize=True)
    return {
        "sketches": n,
        "outputs": outputs,
        "styles_replaced": [layers.start, layers.stop - 1],
        "iou_mixed_with_label_map": mean_iou(label_maps, truth.repeat(outputs, 1, 1)),
        "iou_mixed_with_unmixed": mean_iou(label_maps, plain.repeat(outputs, 1, 1)),
        "iou_unmixed_with_label_map": mean_iou(plain, truth),
        "iou_parser_on_drawings": mean_iou(drawn, truth),
        "mean_absolute_difference": float(torch.stack(pairs).mean()),
    }


def ablation(folder: Path, n: int = 1000) -> dict[str, Any]:
    """Measure the runs of the ablation sweep on held-out faces."""
    import yaml

    faces, scores, runs = draw(HELD_OUT, n), Scores(), {}
    for run in folder.glob("*/overrides.yaml"):
        overrides = yaml.safe_load(run.read_text())
        name = next(o.split("=")[1] for o in overrides if o.startswith("experiment="))
        runs[name.removeprefix("toyfaces_ablation_")] = run.parent / "checkpoints" / "last.ckpt"
    nets = {name: PSP.from_checkpoint(runs[name]) for name in ABLATION}
    return {name: measure(net, "inversion", faces, scores)[0] for name, net in nets.items()}


ROWS = {
    "ablation": {
        "w": "encoder into W",
        "w_plus": "naive encoder into W+",
        "gradual": "gradual style encoder, no id loss",
        "gradual_id": "gradual style encoder, id loss",
    },
    "checkpoints": {task: f"`toyfaces/{task}`" for task in TASKS},
}


def table(results: dict[str, Any]) -> str:
    """Return a markdown table of the measured networks, the projection last."""
    lines = ["| | MSE | PSNR, dB | perceptual | id similarity | ms per image |", "|---|---|---|---|---|---|"]
    rows = {ROWS[part][name]: row for part in ROWS for name, row in results.get(part, {}).items()}
    if "projection" in results:
        rows[f"projection, {results['projection']['steps']} steps"] = results["projection"]
    for name, row in rows.items():
        scores = f"{row['mse']:.4f} | {row['psnr']:.1f} | {row['perceptual']:.2f} | {row['id_similarity']:.2f}"
        lines.append(f"| {name} | {scores} | {row['ms_per_image']:.{0 if row['ms_per_image'] > 100 else 1}f} |")
    return "\n".join(lines)


def main() -> None:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        f.__name__: f for f in (samples, frechet, projection, checkpoints, mixing)
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=parts, help="default: all parts")
    parser.add_argument("--ablation", type=Path, help="folder of the ablation sweep, to measure it as well")
    parser.add_argument("--generator", type=Path, help="run folder of the generator's training, to measure it as well")
    options = parser.parse_args()
    if options.ablation:
        parts["ablation"] = partial(ablation, options.ablation)
    if options.generator:
        parts["training"] = partial(training, options.generator)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    files = {name: entry.sha256 for name, entry in shipped().items()}
    if any(results.get("sha256", {}).get(name) != files[name] for name in ("toyfaces/generator", "toyfaces/identity")):
        results = {}  # all results depend on these two networks
    results["sha256"] = files
    for name in parts:
        if options.only is not None and name not in (*options.only, "ablation", "training"):
            continue
        print(name, flush=True)
        results[name] = parts[name]()
        print(json.dumps(results[name], indent=1), flush=True)
        results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(RESULTS)


if __name__ == "__main__":
    main()

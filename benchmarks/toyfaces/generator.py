"""Measure the generator of the drawn faces: `python -m benchmarks.toyfaces.generator [--run FOLDER]`.

Without arguments: the Frechet distance of 10,000 generated to 10,000 drawn faces, and of two disjoint drawn sets. With
the run folder of psp-train-generator: the distance after increasing numbers of steps, and their picture for the docs.
Results are merged into benchmarks/results/generator.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.toyfaces.faces import HELD_OUT, draw
from psp_lightning.lit.callbacks.samples import sample_images, tile
from psp_lightning.loading import load_embedding, load_generator
from psp_lightning.metrics.frechet import FrechetDistance
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.images import save_atomic, to_pil
from psp_lightning.zoo.locate import shipped

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "generator.json"
BATCH = 16  # images per step of the training
MEASURED = ("toyfaces/generator", "toyfaces/identity")


@torch.no_grad()
def generate(generator: Generator, n: int) -> Iterator[Tensor]:
    """Generate `n` samples without truncation, 50 at a time, from fixed latents and noise."""
    torch.manual_seed(0)
    for _ in range(0, n, 50):
        yield generator(torch.randn(50, generator.z_dim), noise="random")


def distance() -> FrechetDistance:
    """Return a Frechet distance in the features of the identity network."""
    embedding = load_embedding("toyfaces/identity").eval()
    return FrechetDistance(embedding.statistics, sum(embedding.config["widths"]))


def frechet(n: int = 10_000) -> dict[str, Any]:
    """Measure the Frechet distance of generated to drawn faces, and of two disjoint drawn sets."""
    generator, _ = load_generator("toyfaces/generator")
    generated, drawn = distance(), distance()
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
    measure = distance()
    measure.update(draw(HELD_OUT, n).images, real=True)
    rows, grid = [], []
    for file in sorted(run.glob("generator_*.safetensors")):
        steps = int(file.stem.removeprefix("generator_"))
        if steps > max(shown):
            continue
        generator, _ = load_generator(file)
        measure.fake = []
        for images in generate(generator, n):
            measure.update(images, real=False)
        rows.append({"steps": steps, "images": steps * BATCH, "frechet": float(measure.compute())})
        if steps in shown:
            grid.append(sample_images(generator, 8, 0.7))
    save_atomic(to_pil(tile(torch.cat(grid), 8)), ROOT / "docs" / "toyfaces_training.png", optimize=True)
    return {"images": n, "exports": rows}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser("python -m benchmarks.toyfaces.generator", description=__doc__)
    parser.add_argument("--run", type=Path, help="run folder of psp-train-generator, to measure its training instead")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if given.run is None:
        results["sha256"] = {name: shipped()[name].sha256 for name in MEASURED}
        results["frechet"] = frechet()
    else:
        results["training"] = training(given.run)
    with replacing(RESULTS) as part:
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()

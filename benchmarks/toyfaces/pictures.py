"""Draw the pictures of the drawn faces in the documentation: `python -m benchmarks.toyfaces.pictures`.

The shipped networks make them for docs/toyfaces.md and docs/refiner.md. All faces come from a seed that no training
uses. The script takes about three minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.toyfaces.faces import HELD_OUT
from psp_lightning import PSP
from psp_lightning.data.datamodules import DATAMODULES
from psp_lightning.data.spec import InputSpec, source_to_rgb
from psp_lightning.data.stores import ToyFacesStore
from psp_lightning.inference.frozen import freeze_generator
from psp_lightning.inference.projection import project
from psp_lightning.lit.callbacks.samples import sample_images, tile
from psp_lightning.loading import load_generator
from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.losses.perceptual import PerceptualLoss
from psp_lightning.utils.images import save_atomic, to_pil

DOCS = Path(__file__).parents[2] / "docs"
TASKS = ("inversion", "sketch2face", "seg2face", "superres")


def save(name: str, images: Tensor) -> None:
    """Write images (n, 3, S, S) to docs/toyfaces_NAME.png, eight in a row."""
    save_atomic(to_pil(tile(images, 8)), DOCS / f"toyfaces_{name}.png", optimize=True)


def sources(net: PSP, task: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first sources of a validation of the task, these sources as pictures, and their targets."""
    store = ToyFacesStore(size=64, seed=HELD_OUT, n=n)
    data = DATAMODULES[task](store, store, input_size=64, target_size=64, seed=0)
    data.spec = spec = InputSpec.from_dict(net.source)
    items = [data.dataset("val")[i] for i in range(n)]
    source = torch.stack([item["source"] for item in items])
    return source, source_to_rgb(source, spec), torch.stack([item["target"] for item in items])


@torch.no_grad()
def draw_samples() -> None:
    """Draw 8 x 8 samples with truncation 0.7 and without."""
    generator, _ = load_generator("toyfaces/generator")
    for psi in (0.7, 1.0):
        save(f"samples_{psi}", sample_images(generator, 64, psi))


@torch.no_grad()
def draw_tasks() -> None:
    """Draw eight sources, outputs and targets of each shipped encoder."""
    for task in TASKS:
        net = PSP.from_pretrained(f"toyfaces/{task}")
        source, shown, target = sources(net, task, 8)
        save(task, torch.cat([shown, net(source), target]))


@torch.no_grad()
def draw_refined() -> None:
    """Draw eight faces, their inversions, refined inversions, and these after styles 4 to 9 were replaced."""
    net = PSP.from_pretrained("toyfaces/inversion_refined")
    source, shown, _ = sources(net, "inversion", 8)
    inversion = net.invert(source)
    styles = net.generator.mapping(torch.randn(8, net.generator.z_dim, generator=torch.Generator().manual_seed(0)))
    edited = net.mix_styles(inversion, styles, range(4, 10))
    save("refined", torch.cat([shown, net.decode(inversion.w_plus), net.decode(inversion), net.decode(edited)]))


@torch.no_grad()
def draw_mixing(first: int = 4) -> None:
    """Draw six sketches, each with seven outputs; the styles from layer `first` on come from random faces."""
    net = PSP.from_pretrained("toyfaces/sketch2face")
    generator, _ = load_generator("toyfaces/generator")
    source, shown, _ = sources(net, "sketch2face", 6)
    styles = generator.mapping(torch.from_numpy(np.random.default_rng(0).standard_normal((7, generator.z_dim))).float())
    w_plus = net.encode(source)
    rows = []
    for code, sketch in zip(w_plus, shown, strict=True):
        mixed = net.mix_styles(code[None].expand(7, -1, -1), styles, range(first, net.n_styles))
        rows += [sketch[None], net.decode(mixed)]
    save("mixing", torch.cat(rows))


def draw_projection(n: int = 16, steps: int = 500) -> None:
    """Draw pairs of a face and the best output that optimisation of its code finds."""
    generator, average = load_generator("toyfaces/generator")
    assert average is not None
    perceptual = PerceptualLoss("toyfaces/identity")

    def distance(y_hat: Tensor, y: Tensor) -> Tensor:
        return mse_per_image(y_hat, y) + 0.1 * perceptual.distance(y_hat, y)

    _, _, targets = sources(PSP.from_pretrained("toyfaces/inversion"), "inversion", n)
    w_plus = project(freeze_generator(generator), targets, average, distance, steps, lr=0.2)
    with torch.no_grad():
        save("projection", torch.stack([targets, generator.synthesis(w_plus)], 1).flatten(0, 1))


if __name__ == "__main__":
    for draw in (draw_samples, draw_tasks, draw_refined, draw_mixing, draw_projection):
        print(draw.__name__, flush=True)
        draw()
    print(DOCS)

"""Measure the cost of R1 and path length in float32 and in bfloat16: `python -m benchmarks.penalties`.

Run one step of each penalty of psp-train-generator on a CPU with `network=toyfaces`, with both precisions in turns. On
a CPU, training always computes the penalties in float32; bfloat16 is what `model.half` would select otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from psp_lightning import make_reproducible
from psp_lightning.lit.generator import LitGenerator, Recipe
from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.reproducibility import processor


class OneProcess:
    """The attributes of a trainer that the module reads."""

    global_rank, world_size, global_step = 0, 1, 0


class AsAsked(LitGenerator):
    """A module that computes penalties in the precision of its networks."""

    def _penalty_precision(self, network):  # type: ignore[no-untyped-def]
        return torch.enable_grad()


def build(kind: type[LitGenerator], size: int) -> LitGenerator:
    """Build the networks of `network=toyfaces` with `model.half=bfloat16`."""
    torch.manual_seed(0)
    generator = Generator(
        size, style_dim=64, z_dim=64, n_mapping=4, channel_multiplier=1, channel_base=1536, max_channels=96
    )
    module = kind(generator, Discriminator(size, 1536, 96), recipe=Recipe(augment="none"))
    module._trainer = OneProcess()  # type: ignore[assignment]
    for network in (module.generator, module.discriminator):
        network.to(memory_format=torch.channels_last)
        network.use_half(max(8, size >> 3), torch.bfloat16)
    return module


def seconds(module: LitGenerator, images: torch.Tensor) -> dict[str, float]:
    """Return the seconds of one step of each penalty."""
    found = {}
    for name, network in (("path length", module.generator), ("R1", module.discriminator)):
        module._train_only(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        start = time.perf_counter()
        if name == "R1":
            module._r1_step(images, optimizer)
        else:
            module._path_step(max(1, len(images) // 2), optimizer)
        found[name] = time.perf_counter() - start
    return found


def main() -> None:
    """Measure and print both penalties."""
    parser = argparse.ArgumentParser("python -m benchmarks.penalties", description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    make_reproducible()
    modules = {"float32": build(LitGenerator, given.size), "bfloat16": build(AsAsked, given.size)}
    images = torch.rand(given.batch, 3, given.size, given.size).to(memory_format=torch.channels_last) * 2 - 1
    times: dict[str, list[dict[str, float]]] = {name: [] for name in modules}
    for turn in range(given.rounds + 1):
        for name in list(modules)[:: 1 if turn % 2 else -1]:
            found = seconds(modules[name], images)
            if turn:  # the first round is a warm-up
                times[name].append(found)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for penalty in times["float32"][0]:
        full, half = (statistics.median(run[penalty] for run in times[name]) for name in ("float32", "bfloat16"))
        print(f"{penalty}: float32 {full:.3f} s, bfloat16 {half:.3f} s, ratio {full / half:.2f}")


if __name__ == "__main__":
    main()

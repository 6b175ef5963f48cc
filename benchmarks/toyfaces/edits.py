"""Measure whether refined inversions of drawn faces keep edits: `python -m benchmarks.toyfaces.edits [--train]`.

Each row is one way to refine the codes of the shipped encoder; one row is the shipped refiner. Held-out faces give the
PSNR and the identity similarity of the reconstruction and, after styles 4 to 9 were replaced, the mean IoU between the
regions of the output and the face's label map. Generated images G(w*), whose edited form is known, give the PSNR
between the edited inversion and the edited G(w*).

With --train, measure refiners instead: train (or continue to train) one for each resolution, with and without edit
pairs, for 1,000 steps of 8 images. Results go to benchmarks/results/edits.json and to the table in docs/refiner.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.toyfaces.faces import HELD_OUT, draw
from benchmarks.toyfaces.results import ROOT
from psp_lightning.inference.frozen import freeze_psp_generator
from psp_lightning.inference.invert import Inverter, Optimization, Step, keep_codes, refine_features
from psp_lightning.inference.optimize import Optimizer
from psp_lightning.loading import load_embedding, load_psp
from psp_lightning.metrics.networks import KIND_OF_CLASS, mean_iou
from psp_lightning.models.psp import PSP
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.images import from_uint8, to_uint8
from psp_lightning.zoo.locate import find, sha256

RESULTS = ROOT / "benchmarks" / "results" / "edits.json"
PAGE = ROOT / "docs" / "refiner.md"
SHIPPED = "toyfaces/inversion"
MIXED = range(4, 10)  # styles that the edit replaces
REFINED = "shipped refiner, 32 x 32"
IMAGES, BATCH, STEPS, TRAINING = 32, 16, 50, 1000
WIDTHS = {8: 96, 16: 96, 32: 48}  # of the refiner, by the side of its feature map; 16 and 32 take about equal time
SHARES = (0.25, 0.0)
COLUMNS = {
    "psnr": ("PSNR, dB", 1), "id_similarity": ("identity", 3), "miou_mixed": ("mIoU after mixing", 3),
    "psnr_edited": ("PSNR of the edited image, dB", 1),
}  # fmt: skip


class MSE(nn.Module):
    """The mean squared error of each image, summed over the images."""

    def forward(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return a scalar for two batches (B, 3, S, S)."""
        return (y_hat - y).square().mean((1, 2, 3)).sum()


def optimise(space: str) -> Step:
    """Return a step that minimises the mean squared error."""
    return Optimization(MSE(), partial(Optimizer, space=space, steps=STEPS))


OPTIMISED: dict[str, Callable[[], Step]] = {
    "encoder": lambda: keep_codes,
    f"{STEPS} steps in W": lambda: optimise("w"),
    f"{STEPS} steps in W+": lambda: optimise("w_plus"),
    f"{STEPS} steps in features, 16 x 16": lambda: optimise("features"),
    f"{STEPS} steps of weights (PTI)": lambda: optimise("weights"),
    REFINED: lambda: refine_features,
}


def train(side: int, share: float, folder: Path) -> Path:
    """Train a refiner, or continue or skip its training, and return its last checkpoint."""
    run = f"r{side}_{share}"
    command = [sys.executable, "-m", "psp_lightning.cli.train", "experiment=toyfaces_inversion_refined",
               f"refiner.resolution={side}", f"refiner.width={WIDTHS[side]}", f"refiner.edit_share={share}",
               "trainer=cpu", f"trainer.max_steps={TRAINING}", f"model.decay_steps={TRAINING // 2}",
               f"paths.runs={folder}", f"run={run}", "resume=auto"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    return folder / "inversion" / run / "checkpoints" / "last.ckpt"


def seen(images: Tensor) -> Tensor:
    """Return images as they are saved, with 8 bits."""
    return from_uint8(to_uint8(images))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR (B,) of images in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))


@torch.no_grad()
def measure(net: PSP, step: Step, n: int = IMAGES) -> dict[str, float]:
    """Return the mean of each column over `n` images."""
    identity, parser = load_embedding("toyfaces/identity"), load_embedding("toyfaces/parser")
    kinds = torch.tensor(KIND_OF_CLASS)
    source = torch.Generator().manual_seed(0)
    values: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    inverter = Inverter(None, step)
    for start in tqdm(range(0, n, BATCH), "edits"):
        faces = draw(HELD_OUT, min(BATCH, n - start), start)
        x = faces.images
        known, other = (
            net.generator.mapping(torch.randn(len(x), net.generator.z_dim, generator=source)) for _ in range(2)
        )
        w_star = known[:, None].expand(-1, net.n_styles, -1)
        found = inverter(net, x, x)
        y = seen(net.decode(found))
        mixed = seen(net.decode(net.mix_styles(found, other, MIXED)))
        values["psnr"].append(psnr(y, x))
        values["id_similarity"].append((identity(y) * identity(x)).sum(1))
        values["miou_mixed"].append(mean_iou(parser.regions(mixed), kinds[torch.from_numpy(faces.labels).long()]))
        drawn = net.decode(w_star).clamp(-1, 1)
        edited = net.decode(net.mix_styles(inverter(net, drawn, drawn), other, MIXED))
        target = net.decode(net.mix_styles(w_star, other, MIXED))
        values["psnr_edited"].append(psnr(seen(edited), seen(target)))
    return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the rows as markdown."""
    lines = [["", *(head for head, _ in COLUMNS.values())], ["---"] * (len(COLUMNS) + 1)]
    lines += [[name, *(f"{row[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items())] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, results: dict[str, Any]) -> str:
    """Return the text of the page with the table between its marks."""
    begin, end = "<!-- edits: begin -->", "<!-- edits: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table(results['rows'])}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Measure the rows, or only the rows that --only selects, and write the file and the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.toyfaces.edits", description=__doc__)
    parser.add_argument("--train", action="store_true", help="train and measure refiners, in an hour")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure only the rows whose names start with ROW")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder in which the refiners are trained")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}
    refiners = {
        f"refiner {side} x {side}{'' if share else ', no edit pairs'}": (side, share)
        for side in WIDTHS
        for share in SHARES
    }
    order = [*OPTIMISED, *refiners]
    for name in refiners if given.train else OPTIMISED:
        if given.only is not None and not name.startswith(tuple(given.only)):
            continue
        if name in refiners:
            path: Path | str = train(*refiners[name], given.folder.resolve())
        else:
            path = f"{SHIPPED}_refined" if name == REFINED else SHIPPED
        step = OPTIMISED[name]() if name in OPTIMISED else refine_features
        trained = {"training_steps": TRAINING} if name in refiners else {"sha256": sha256(find(str(path)))}
        results["rows"][name] = {**measure(freeze_psp_generator(load_psp(path)), step), **trained}
        print(name, results["rows"][name], flush=True)
        results |= {"images": IMAGES, "torch": torch.__version__}
        results["rows"] = {key: results["rows"][key] for key in order if key in results["rows"]}
        with replacing(RESULTS) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        with replacing(PAGE) as part:
            part.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

"""psp-demo: run the trained networks, style mixing and a short training on drawn faces; show them on one page."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psp_lightning.cli.settings import command, parse
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.cli.demo_page import Picture, SheetRow

TRAINED_ON = (1, 2, 11)  # seeds of the training faces of generator and encoders, validation, and identity network
USAGE = "psp-demo [out=demo]"
HELP = f"""{USAGE} [steps=300] [seed=100]

Shows what the package does, on this machine, in a few minutes and without a download:
  1. draws 8 faces that no network has seen
  2. predicts with one trained network for each of four tasks: inversion, sketch2face, seg2face, superres
  3. refines the inversion, and edits the refined faces
  4. mixes styles: several faces for one sketch
  5. trains an inversion from scratch for a few hundred steps
Writes a page with all results, OUT/index.html, and the same as one picture, OUT/demo.png.
Each part prints the command that it runs. Existing files are not changed or deleted.

out     folder; if it contains files already, OUT_2, OUT_3, ... is used
steps   training steps
seed    seed of the drawn faces; not 1, 2 or 11, because the networks were trained on those faces

Your own networks, each a run folder or a file as in psp-predict ckpt=...:
inversion, sketch2face, seg2face, superres     default: toyfaces/inversion etc., which come with the package
refined                                        an inversion with a refiner; default: toyfaces/inversion_refined
train   additional settings for the training, as in psp-train: train='optimizer.lr=3e-4 data.batch_size=4'
"""
N, SIZE, FACTOR = 8, 64, 8  # number and size of the drawn faces; downsampling factor for super-resolution
FINE = "[4,5,6,7,8,9]"  # the styles, of ten, for 16 px and finer: they set colours, not shapes
MIXED = 3  # number of sketches with mixed outputs


# name -> title and text of its section, folder of psp-data that contains its inputs
TASKS = {
    "inversion": (
        "Inversion: a face becomes a latent code, and the code becomes a face",
        "Top: a drawn face. Bottom: the generator's image for the code that the encoder predicts.",
        "CelebA-HQ-img",
    ),
    "sketch2face": (
        "sketch2face: a line sketch becomes a face",
        "Top: the sketch, the only input. Middle: the output; a sketch has no colours, so the network guesses them. "
        "Bottom: the face that the sketch was drawn from.",
        "sketch",
    ),
    "seg2face": (
        "seg2face: a label map becomes a face",
        "Top: the label map, one colour per class. Middle: the output. Bottom: the face that the map was drawn from.",
        "CelebAMask-HQ-mask",
    ),
    "superres": (
        f"superres: {SIZE // FACTOR} x {SIZE // FACTOR} pixels become a face",
        f"Top: the face at {SIZE // FACTOR} x {SIZE // FACTOR} pixels, enlarged. Middle: the output. Bottom: the "
        "face at full size.",
        "CelebA-HQ-img",
    ),
}
NETWORKS = {**{task: f"toyfaces/{task}" for task in TASKS}, "refined": "toyfaces/inversion_refined"}
DEFAULTS = {"out": "demo", "steps": 300, "seed": 100, **NETWORKS, "train": ""}


def _parse(arguments: list[str]) -> dict[str, Any]:
    values = parse(arguments, DEFAULTS, [], USAGE)
    whole("steps", values["steps"], 1)
    if whole("seed", values["seed"], 0) in TRAINED_ON:
        raise UserError(f"seed={values['seed']} draws faces that the networks were trained on. Choose another seed.")
    try:
        values["train"] = shlex.split(values["train"])
    except ValueError:
        raise UserError(f"train={values['train']}: a quotation mark is not closed.") from None
    return values


def _create_folder(out: Path) -> Path:
    """Create `out`, or if it contains files already, the first of OUT_2, OUT_3, ... that does not; return it.

    Raises:
        UserError: `out` is a file.
    """
    folder, number = out, 1
    while folder.is_dir() and any(folder.iterdir()):
        number += 1
        folder = out.with_name(f"{out.name}_{number}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file. Give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _call(name: str, *arguments: str) -> str:
    """Print another command of this package, run it in this process, and return it as a user would type it.

    One process is faster: importing PyTorch for each command takes longer than the predictions.
    """
    from hydra.core.global_hydra import GlobalHydra

    from psp_lightning.cli import data, predict, train

    main: Callable[[], None] = {"data": data.main, "predict": predict.main, "train": train.main}[name]
    line = shlex.join([f"psp-{name}", *arguments])
    print(f"$ {line}", flush=True)
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, [f"psp-{name}", *arguments]
    try:
        main()  # on a mistake, this exits the program, as the command does
    finally:
        sys.argv = before
        sys.stdout.flush()
    return line


def _files(folder: Path, suffix: str = ".png") -> list[Path]:
    return [folder / f"{i}{suffix}" for i in range(N)]


def _columns(*lines: tuple[str, Sequence[Path]]) -> list[list[Picture]]:
    """Return one cell per face, with a picture from each line from top to bottom."""
    from psp_lightning.cli.demo_page import Picture

    return [[Picture(paths[i], f"{shows} {i}") for shows, paths in lines] for i in range(N)]


def _demo(values: dict[str, Any], out: Path) -> Path:
    """Run all parts and return the page."""
    from psp_lightning import __version__
    from psp_lightning.cli.demo_page import Part, Picture, read_losses, write_page, write_sheet

    start = time.monotonic()
    steps = values["steps"]
    n_steps = f"{steps} step{'' if steps == 1 else 's'}"
    faces = out / "faces"
    originals, sketches = _files(faces / "CelebA-HQ-img", ".jpg"), _files(faces / "sketch")
    parts: list[Part] = []
    sheet: list[tuple[str, list[SheetRow]]] = []

    def announce(number: int, text: str) -> None:
        print(f"\n[{number}/{len(TASKS) + 5}] {text}", flush=True)

    def predict(ckpt: str, source: str, target: str, *more: str) -> str:
        folders = f"input={faces / source}", f"output={out / target}"
        return _call("predict", f"ckpt={ckpt}", *folders, *more, "num_workers=0")

    announce(1, f"{N} faces that no network has seen")
    commands = [_call("data", "toyfaces", f"out={faces}", f"n={N}", f"size={SIZE}", f"seed={values['seed']}")]

    for number, (name, (title, text, folder)) in enumerate(TASKS.items(), 2):
        announce(number, title)
        more = [f"factor={FACTOR}"] if name == "superres" else []
        more += ["side_by_side=true"] if name in ("seg2face", "superres") else []
        commands.append(predict(values[name], folder, name, *more))
        inputs = {"inversion": originals, "sketch2face": sketches}.get(name) or _sources(out, name)
        outputs = _files(out / name)
        lines: list[tuple[str, Sequence[Path]]] = [(f"{name}, input", inputs), (f"{name}, output", outputs)]
        if name != "inversion":
            lines.append(("drawn face", originals))
        parts.append(Part(title, text, commands, [_columns(*lines)]))
        sheet.append((title, [("input", inputs), ("output", outputs)]))
        commands = []

    title = "Refinement: what the code cannot express comes back, and the result can be edited"
    announce(len(TASKS) + 2, title)
    folder = "CelebA-HQ-img"
    commands = [
        predict(values["refined"], folder, "refined", "refine=features"),
        predict(values["refined"], folder, "refined_edited", "refine=features", f"mix.latent_mask={FINE}"),
    ]
    stages = {
        "input": originals, "inversion": _files(out / "inversion"), "refined": _files(out / "refined"),
        "refined,\nedited": _files(out / "refined_edited"),
    }  # fmt: skip
    text = (
        "From top to bottom: a drawn face; its inversion, from the first part; the refined inversion, for which a "
        "second network adds what is missing to a feature map of the generator; the refined inversion after an edit, "
        "which replaces the fine styles with styles of a random face."
    )
    parts.append(Part(title, text, commands, [_columns(*stages.items())]))
    sheet.append((title, list(stages.items())))

    title = "Style mixing: several faces for one sketch"
    announce(len(TASKS) + 3, title)
    mixing = predict(values["sketch2face"], "sketch", "mixing", f"mix.latent_mask={FINE}", f"mix.n_outputs={N}")
    mixed = [[out / "mixing" / f"{i}_{k}.png" for k in range(N)] for i in range(MIXED)]
    rows = [
        [[Picture(sketches[i], f"sketch {i}")], *([Picture(p, f"sketch {i}, style {k}")] for k, p in enumerate(line))]
        for i, line in enumerate(mixed)
    ]
    text = (
        "First in each row: the sketch. The rest: eight outputs for it. The coarse styles come from the sketch, the "
        "fine ones (4 to 9 of 0 to 9) are random, but the same within a column. Shapes stay, colours change."
    )
    parts.append(Part(title, text, [mixing], rows))
    sheet.append((title, [(sketches[i], line) for i, line in enumerate(mixed)]))

    title = f"A training from scratch: inversion, {n_steps}"
    announce(len(TASKS) + 4, title)
    began = time.monotonic()
    run = out / "runs" / "inversion" / "demo"
    trained = _call(
        "train",
        "experiment=toyfaces_inversion",
        f"paths.runs={out / 'runs'}",
        "run=demo",
        "data.batch_size=8",
        f"trainer.max_steps={steps}",
        f"trainer.val_every={max(1, steps // 3)}",
        f"trainer.log_every_n_steps={max(1, steps // 60)}",
        f"model.warmup_steps={steps // 15}",
        f"model.decay_steps={steps // 3}",
        *values["train"],
    )
    text = (
        f"The encoder starts from random weights and trains for {n_steps} ({_time(time.monotonic() - began)} here); "
        "the generator stays frozen. Top: a drawn face. Middle: the output after this training. Bottom: the output of "
        "the network in the first part, which was trained for longer."
    )
    again = predict(str(run), "CelebA-HQ-img", "trained")
    after = _files(out / "trained")
    cells = _columns(
        ("drawn face", originals), (f"after {n_steps}, output", after), ("inversion, output", _files(out / "inversion"))
    )
    losses = read_losses(run / "csv" / "metrics.csv")
    grids = [(step, run / "images" / f"val_{step:08d}.png") for step, _ in losses["validation"]]
    pictures = [Picture(path, f"step {step}: input, target, output") for step, path in grids if path.is_file()]
    parts.append(Part(title, text, [trained, again], [cells], losses, pictures))
    sheet.append((title, [("input", originals), (f"output after\n{n_steps}", after)]))

    announce(len(TASKS) + 5, "The page")
    picture, page = out / "demo.png", out / "index.html"
    write_sheet(picture, sheet, losses, "The losses of this training")
    intro = (
        f"pixel2style2pixel on drawn faces of {SIZE} pixels: an encoder turns a picture, a sketch or a label map into "
        "codes of a StyleGAN2, which draws the result. The faces below were drawn for this page; no training has seen "
        "them. The commands above the pictures made them."
    )
    links = {"everything as one picture": picture.name, **_documents(out)}
    footer = f"Made by psp-demo of psp_lightning {__version__} in {_time(time.monotonic() - start)}."
    write_page(page, title="psp_lightning: a demonstration", intro=intro, parts=parts, links=links, footer=footer)
    print(f"done in {_time(time.monotonic() - start)}; everything as one picture: {picture.resolve()}")
    return page


def _sources(out: Path, task: str) -> list[Path]:
    """Write the inputs as the network receives them, the left squares in `side_by_side`; return the files."""
    from PIL import Image

    from psp_lightning.utils.images import save_atomic

    paths = [out / "sources" / f"{task}_{i}.png" for i in range(N)]
    for pair, path in zip(_files(out / task / "side_by_side"), paths, strict=True):
        with Image.open(pair) as image:
            save_atomic(image.crop((0, 0, image.height, image.height)), path)
    return paths


def _documents(out: Path) -> dict[str, str]:
    """Return links to the documents in the source tree; an installed package has none."""
    from psp_lightning._conf import config_root

    root = Path(config_root()).parent
    names = {
        "README": "README.md",
        "the drawn faces and the trained networks": "docs/toyfaces.md",
        "architecture": "docs/architecture.md",
        "your own losses, encoders, tasks": "docs/extending.md",
    }
    try:
        return {
            text: Path(os.path.relpath(root / name, out)).as_posix()
            for text, name in names.items()
            if (root / name).is_file()
        }
    except ValueError:  # the tree is on another drive
        return {}


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def run(arguments: list[str]) -> None:
    """Run the command."""
    values = _parse(arguments)
    print("psp-demo: loading", flush=True)
    from psp_lightning.checkpoints.read import resolve
    from psp_lightning.cli.page import check_packages

    for name in NETWORKS:
        resolve(values[name])  # report a missing file before anything is written
    check_packages("psp-demo")
    page = _demo(values, _create_folder(Path(values["out"]).expanduser()))
    print(page.resolve())


def main() -> None:
    """Entry point of `psp-demo`."""
    command(HELP, run, needs_arguments=False)


if __name__ == "__main__":
    main()

"""psp-demo: all four trained tasks on fresh drawn faces, style mixing, a short training; one page with all of it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psp_lightning.cli.mistakes import guard
from psp_lightning.cli.settings import parse
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.errors import UserError

TASKS = ("inversion", "sketch2face", "seg2face", "superres")
NUMBERS = {"steps": 300, "seed": 100}
TRAINED_ON = (1, 2, 11)  # seeds of faces: the encoders' and the generator's, of validation, the identity network's
USAGE = "psp-demo [out=demo]"
HELP = f"""{USAGE} [steps=300] [seed=100]

Shows on this machine, in a few minutes and without a download, what the package does:
  1. draws 8 faces that no network has seen
  2. predicts with the four trained networks: inversion, sketch2face, seg2face, superres
  3. mixes styles: several faces for one sketch
  4. trains an inversion from scratch for a few hundred steps
and writes a page with all of it, OUT/index.html, and the same as one picture, OUT/demo.png.
Each part prints the command that it runs. Nothing that exists is changed or deleted.

out     folder; where it holds files already, OUT_2, OUT_3, ... is taken
steps   training steps
seed    of the drawn faces; not 1, 2 or 11, whose faces the networks were trained on

Networks of your own, each a run folder or a file as in psp-predict ckpt=...:
inversion, sketch2face, seg2face, superres     default: toyfaces/inversion and so on, part of the package
train   further settings of the training, as in psp-train: train='optimizer.lr=3e-4 data.batch_size=4'
"""
N, SIZE, FACTOR = 8, 64, 8  # drawn faces, their pixels, down-sampling of the super-resolution's input
FINE = "[4,5,6,7,8,9]"  # of the ten styles, those of 16 px and finer: colours, not shapes
MIXED = 3  # sketches whose mixed outputs are shown


@dataclass
class Settings:
    """The command line of psp-demo."""

    out: Path
    numbers: dict[str, int]
    checkpoints: dict[str, str]
    train: list[str]


def _parse(arguments: list[str]) -> Settings:
    defaults = {"out": "demo", **NUMBERS, **{task: f"toyfaces/{task}" for task in TASKS}, "train": ""}
    values = parse(arguments, defaults, [], USAGE)
    numbers = {"steps": whole("steps", values["steps"], 1), "seed": whole("seed", values["seed"], 0)}
    if numbers["seed"] in TRAINED_ON:
        raise UserError(f"seed={numbers['seed']} draws faces that the networks were trained on: choose another.")
    try:
        train = shlex.split(values["train"])
    except ValueError:
        raise UserError(f"train={values['train']}: a quotation mark is not closed.") from None
    return Settings(Path(values["out"]).expanduser(), numbers, {task: values[task] for task in TASKS}, train)


def _free(out: Path) -> Path:
    """Return `out`, or where it holds files already, the first of OUT_2, OUT_3, ... that does not.

    Raises:
        UserError: `out` is a file.
    """
    number = 1
    place = out
    while place.is_dir() and any(place.iterdir()):
        number += 1
        place = out.with_name(f"{out.name}_{number}")
    if place.exists() and not place.is_dir():
        raise UserError(f"out={place} is a file: give a folder.")
    place.mkdir(parents=True, exist_ok=True)
    return place


def _call(command: str, *arguments: str) -> str:
    """Run another command of this package in this process, and print it; returns it as one types it.

    One process, because importing PyTorch six times takes longer than the predictions.
    """
    from hydra.core.global_hydra import GlobalHydra

    from psp_lightning.cli import data, predict, train

    main: Callable[[], None] = {"data": data.main, "predict": predict.main, "train": train.main}[command]
    line = shlex.join([f"psp-{command}", *arguments])
    print(f"$ {line}", flush=True)
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, [f"psp-{command}", *arguments]
    try:
        main()  # ends the program on a mistake, as the command does
    finally:
        sys.argv = before
        sys.stdout.flush()
    return line


TITLES = {
    "inversion": "Inversion: a face becomes a latent code, and the code a face",
    "sketch2face": "sketch2face: a line sketch becomes a face",
    "seg2face": "seg2face: a label map becomes a face",
    "superres": f"superres: {SIZE // FACTOR} x {SIZE // FACTOR} pixels become a face",
}
TEXTS = {
    "inversion": "Top: a drawn face. Bottom: what the generator draws from the code that the encoder found for it.",
    "sketch2face": "Top: the sketch, all that the network sees. Middle: its output; the sketch says nothing of "
    "colours, so they are the network's guess. Bottom: the face that the sketch was drawn from.",
    "seg2face": "Top: the label map, a colour for each class. Middle: the output. Bottom: the face that the map was "
    "drawn from.",
    "superres": f"Top: the face at {SIZE // FACTOR} x {SIZE // FACTOR} pixels, enlarged. Middle: the output. Bottom: "
    "the face before it was made small.",
}
INPUTS = {
    "inversion": "CelebA-HQ-img",
    "sketch2face": "sketch",
    "seg2face": "CelebAMask-HQ-mask",
    "superres": "CelebA-HQ-img",
}


def _demo(settings: Settings) -> Path:
    """Run all parts and return the page."""
    from psp_lightning.cli.demo_page import Part, Picture, SheetRow, read_losses, write_page, write_sheet

    start = time.monotonic()
    out, steps = settings.out, settings.numbers["steps"]

    total = 3 + len(TASKS) + 1

    def say(number: int, text: str) -> None:
        print(f"\n[{number}/{total}] {text}", flush=True)

    say(1, f"{N} faces that no network has seen")
    faces = out / "faces"
    drawn = _call("data", "toyfaces", f"out={faces}", f"n={N}", f"size={SIZE}", f"seed={settings.numbers['seed']}")
    originals = [faces / "CelebA-HQ-img" / f"{i}.jpg" for i in range(N)]
    sketches = [faces / "sketch" / f"{i}.png" for i in range(N)]

    def predict(ckpt: str, source: str, target: str, *more: str) -> str:
        folders = f"input={faces / source}", f"output={out / target}"
        return _call("predict", f"ckpt={ckpt}", *folders, *more, "num_workers=0")

    parts, sheet = [], []
    for number, task in enumerate(TASKS, 2):
        say(number, TITLES[task])
        more = [f"factor={FACTOR}"] if task == "superres" else []
        more += ["side_by_side=true"] if task in ("seg2face", "superres") else []
        commands = [predict(settings.checkpoints[task], INPUTS[task], task, *more)]
        inputs = {"inversion": originals, "sketch2face": sketches}.get(task) or _sources(out, task)
        outputs = [out / task / f"{i}.png" for i in range(N)]
        cells = []
        for i in range(N):
            cell = [Picture(inputs[i], f"{task}, input {i}"), Picture(outputs[i], f"{task}, output {i}")]
            if task != "inversion":
                cell.append(Picture(originals[i], f"drawn face {i}"))
            cells.append(cell)
        if task == "inversion":
            commands.insert(0, drawn)
        parts.append(Part(TITLES[task], TEXTS[task], commands, [cells]))
        sheet.append((TITLES[task], [SheetRow("input", inputs), SheetRow("output", outputs)]))

    say(total - 2, "Style mixing: several faces for one sketch")
    mixing = predict(
        settings.checkpoints["sketch2face"], "sketch", "mixing", f"mix.latent_mask={FINE}", f"mix.n_outputs={N}"
    )
    mixed = [[out / "mixing" / f"{i}_{k}.png" for k in range(N)] for i in range(MIXED)]
    rows = [
        [[Picture(sketches[i], f"sketch {i}")], *([Picture(p, f"sketch {i}, style {k}")] for k, p in enumerate(line))]
        for i, line in enumerate(mixed)
    ]
    text = (
        "First in each row: the sketch. Then eight outputs for it: the coarse styles come from the sketch, the fine "
        "ones (4 to 9 of 0 to 9) are random, the same in each column. Shapes stay, colours change."
    )
    parts.append(Part("Style mixing: several faces for one sketch", text, [mixing], rows))
    sheet.append(
        (
            "Style mixing: one sketch, random fine styles",
            [SheetRow(sketches[i], line) for i, line in enumerate(mixed)],
        )
    )

    say(total - 1, f"A training from scratch: inversion, {steps} steps")
    began = time.monotonic()
    run = out / "runs" / "inversion" / "demo"
    every = max(1, steps // 3)
    trained = _call(
        "train",
        "experiment=toyfaces_inversion",
        f"paths.runs={out / 'runs'}",
        "run=demo",
        "data.batch_size=8",
        f"trainer.max_steps={steps}",
        f"trainer.val_every={every}",
        f"trainer.log_every_n_steps={max(1, steps // 60)}",
        f"model.warmup_steps={steps // 15}",
        f"model.decay_steps={steps // 3}",
        *settings.train,
    )
    seconds = time.monotonic() - began
    again = predict(str(run), "CelebA-HQ-img", "trained")
    losses = read_losses(run / "csv" / "metrics.csv")
    after = [out / "trained" / f"{i}.png" for i in range(N)]
    shipped = [out / "inversion" / f"{i}.png" for i in range(N)]
    grids = [(step, run / "images" / f"val_{step:08d}.png") for step, _ in losses["validation"]]
    text = (
        f"The encoder starts from random weights and learns for {steps} steps ({_time(seconds)} here); the generator "
        "stays as it is. Top: a drawn face. Middle: the output after this training. Bottom: the output of the network "
        "of the first part, which was trained for longer."
    )
    pictures = [Picture(path, f"step {step}: input, target, output") for step, path in grids if path.is_file()]
    cells = [
        [
            Picture(originals[i], f"drawn face {i}"),
            Picture(after[i], f"after {steps} steps, output {i}"),
            Picture(shipped[i], f"inversion, output {i}"),
        ]
        for i in range(N)
    ]
    title = f"A training from scratch: inversion, {steps} steps"
    parts.append(Part(title, text, [trained, again], [cells], losses, pictures))
    sheet.append((title, [SheetRow("input", originals), SheetRow(f"output after\n{steps} steps", after)]))

    say(total, "The page")
    write_sheet(out / "demo.png", sheet, losses, "The loss of this training")
    page = out / "index.html"
    intro = (
        "pixel2style2pixel on drawn faces of 64 pixels: an encoder turns a picture, a sketch or a label map into "
        "codes of a StyleGAN2, which draws the result. The faces below were drawn for this page; no training saw "
        "them. Above each row of pictures is the command that made them."
    )
    from psp_lightning import __version__

    footer = f"Made by psp-demo of psp_lightning {__version__} in {_time(time.monotonic() - start)}."
    links = {"everything as one picture": "demo.png", **_documents(out)}
    write_page(page, title="psp_lightning: a demonstration", intro=intro, parts=parts, links=links, footer=footer)
    print(f"done in {_time(time.monotonic() - start)}; the same as one picture: {(out / 'demo.png').resolve()}")
    return page


def _sources(out: Path, task: str) -> list[Path]:
    """The inputs as the network sees them: the left squares of what `side_by_side` wrote."""
    from PIL import Image

    from psp_lightning.utils.images import save_atomic

    paths = []
    for i in range(N):
        paths.append(out / "sources" / f"{task}_{i}.png")
        with Image.open(out / task / "side_by_side" / f"{i}.png") as image:
            save_atomic(image.crop((0, 0, image.height, image.height)), paths[-1])
    return paths


def _documents(out: Path) -> dict[str, str]:
    """Links to the documents of a source tree; an installed package has none."""
    from psp_lightning._conf import config_root

    root = Path(config_root()).parent
    names = {
        "README": "README.md",
        "the drawn faces and the trained networks": "docs/toyfaces.md",
        "how it is built": "docs/architecture.md",
        "your own losses, encoders, tasks": "docs/extending.md",
    }
    try:
        return {
            text: Path(os.path.relpath(root / name, out)).as_posix()
            for text, name in names.items()
            if (root / "src").is_dir() and (root / name).is_file()
        }
    except ValueError:  # another drive
        return {}


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main() -> None:
    """Entry point of `psp-demo`."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        sys.exit(0)

    def run() -> None:
        settings = _parse(arguments)
        print("psp-demo: loading", flush=True)
        from psp_lightning.checkpoints.read import resolve
        from psp_lightning.cli.demo_page import check_packages

        for checkpoint in settings.checkpoints.values():
            resolve(checkpoint)  # what is missing is said before anything is written
        check_packages()
        settings.out = _free(settings.out)
        page = _demo(settings)
        print(page.resolve())

    guard(run)


if __name__ == "__main__":
    main()

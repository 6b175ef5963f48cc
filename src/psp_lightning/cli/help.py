"""--help and --version of the commands that Hydra configures; the comments in conf/ explain the settings."""

from __future__ import annotations

import itertools
import os
import re
import sys
import textwrap
from pathlib import Path

import yaml

from psp_lightning import __version__
from psp_lightning._conf import config_root

WIDTH, COLUMN = 120, 26
MAKER = "generator_training/"

# For each command: the file with the examples (`help.header`), the files with the settings, and the settings to show,
# most used first (empty: all settings in the files).
PAGES: dict[str, tuple[str, list[str], str]] = {
    "psp-predict": (
        "predict",
        ["predict"],
        """ckpt input output format resize side_by_side sheet latents refinements overwrite embed refine factor
        mask.kind mask.dir mask.composite mix.latent_mask mix.n_outputs mix.alpha mix.seed mix.reference align faces
        landmarks paste_back paste.match_colour paste.parser batch_size num_workers accelerator devices precision seed
        plugins""",
    ),
    "psp-evaluate": (
        "evaluation/evaluate",
        ["evaluation/evaluate", "evaluation/data/folder"],
        """ckpt outputs targets data data.root data.source data.target data.limit metric task refine output name as size
        factor mask.kind mix.latent_mask mix.n_outputs images timing batch_size num_workers accelerator devices seed
        plugins""",
    ),
    "psp-train": (
        "hydra/default",
        [
            "train", "domain/toyfaces", "data/folder", "generator/file", "trainer/default", "optimizer/ranger",
            "paths/default",
        ],
        """task domain data data.root data.source data.target data.val_root run resume init_from generator
        generator.path trainer trainer.max_steps trainer.val_every trainer.devices trainer.precision data.batch_size
        data.num_workers data.limit optimizer optimizer.lr loss encoder experiment logger paths.runs seed plugins
        hparams_search objective""",
    ),
    "psp-doctor data": (
        "hydra/doctor",
        ["doctor", "train", "domain/toyfaces", "data/folder", "generator/file", "trainer/default"],
        """task domain data data.root data.source data.target data.val_root data.unpaired data.batch_size
        generator.path loss trainer.max_steps doctor.output doctor.workers doctor.images doctor.faces doctor.steps
        doctor.minutes doctor.trial doctor.progress_bar""",
    ),
    "psp-train-generator": (
        f"{MAKER}hydra/default",
        [
            f"{MAKER}train_generator", f"{MAKER}domain/folder", f"{MAKER}trainer/default",
            f"{MAKER}optimizer/adam", f"{MAKER}model/default", f"{MAKER}callbacks/default",
            "paths/default",
        ],
        """data.root domain.size data.fit data.flip domain network run resume init_from trainer trainer.max_steps
        trainer.devices data.batch_size data.num_workers data.limit data.cache data.name data.licence model.augment
        model.r1_gamma model.half optimizer.lr logger paths.runs callbacks.export.every_n_steps
        callbacks.images.every_n_steps seed plugins""",
    ),
}  # fmt: skip


def answer(command: str) -> None:
    """Print the help or the version and exit, if the command line asks for it."""
    arguments = set(sys.argv[1:])
    if {"-h", "--help"} & arguments:
        print(page(command))
    elif "--version" in arguments:
        print(command, __version__)
    else:
        return
    sys.exit(0)


def page(command: str) -> str:
    """Return the help of a command: examples, then one line for each setting with its default and its comment."""
    examples, files, names = PAGES[command]
    content = yaml.safe_load(_path(examples).read_text(encoding="utf-8"))
    known: dict[str, tuple[str, str]] = {}
    for file in files:
        known = comments(_path(file)) | known
    chosen = names.split() or [name for name, (value, _) in known.items() if value and not name.startswith("hydra.")]
    rows = [(_setting(name, known[name][0]), _explain(name, known[name][1])) for name in chosen]
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * COLUMN).fill
    lines = [wrap(f"{setting:<{COLUMN - 2}}  {text}") for setting, text in rows]
    header = content.get("hydra", content)["help"]["header"]
    return "\n".join([header, *lines, "", f"{command} --cfg job prints all settings, --hydra-help Hydra's options."])


def comments(file: Path) -> dict[str, tuple[str, str]]:
    """Return value and comment of each key in a file of conf/, by the name that the key has on a command line.

    A comment is on the line of its key or on the lines above it; the first lines of a file are about the whole file.
    Groups in the list `defaults` are keys, too.
    """
    found: dict[str, tuple[str, str]] = {}
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    lines = file.read_text(encoding="utf-8").splitlines()
    prefix = "" if {"# @package _global_", "defaults:"} & set(lines) else f"{file.parent.name}."
    for line in itertools.dropwhile(lambda line: line.startswith("#"), lines):
        if comment := re.fullmatch(r"\s*# (.*)", line):
            above.append(comment[1])
        elif key := re.fullmatch(r"( *)(?:- /?)?(\w+):(?: ([^#]*?))?(?:\s+# (.*))?", line):
            parents = [(indent, name) for indent, name in parents if indent < len(key[1])] + [(len(key[1]), key[2])]
            name = ".".join(name for _, name in parents).removeprefix("defaults.")
            found[prefix + name] = (key[3] or "").strip(), " ".join([*above, *filter(None, [key[4]])])
            above = []
        else:
            above = []
    return found


def _path(name: str) -> Path:
    return Path(config_root(), f"{name}.yaml")


def _setting(name: str, value: str) -> str:
    """Return `name=default`, or only the name of a setting whose default is derived."""
    return name if "${" in value else f"{name}={value.replace('???', '...').replace(', ', ',')}"


def _explain(name: str, comment: str) -> str:
    """Return the first sentence of a comment, and the options of a group if the comment does not list them."""
    text = re.split(r"\. (?=[A-Z])", comment)[0]
    if text[1:2].islower() and not text.startswith("Python"):  # "GPU only" stays
        text = text[0].lower() + text[1:]  # as in comments of a single sentence
    options = sorted(os.listdir(folder)) if (folder := Path(config_root(), name)).is_dir() else []
    names = [option.removesuffix(".yaml") for option in options]
    return f"{text}: {', '.join(names)}" if any(name not in text for name in names) and " | " not in text else text

"""Generate a page for every configuration group from the YAML files below `conf/` and their comments."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
TRAINING, EVALUATION = "generator_training", "evaluation"  # folders of two commands' own files

# Page -> what its first paragraph says. Groups of `conf/generator_training` are called `generator_training/GROUP`, and
# groups of `conf/evaluation` likewise.
TEXTS = {
    "train": "The keys of `psp-train` that belong to no group, and the groups it starts from.",
    "predict": "The keys of `psp-predict` that belong to no group. Its groups are `embed`, `refine` and `loss`.",
    "evaluation": "The keys of `psp-evaluate` that belong to no group, and the groups it starts from. Groups that have "
    "no page below are those of `psp-train`.",
    "doctor": "The keys of `psp-doctor data`; the others are those of `psp-train`.",
    "callbacks": "Checkpoints, image grids and other callbacks of `psp-train`: `callbacks=NAME` selects a file, and "
    "`callbacks.images=null` removes one of its entries.",
    "data": "Where the images come from: `data=folder`, `data=toyfaces`, `data=generated` without any images, or "
    "`data=dataset`, on which a file of your own is based.",
    "debug": "Short runs that check whether everything works: `debug=fast`, `debug=overfit10`.",
    "domain": "The kind of images. A domain selects a generator, an encoder, a data source and loss terms that go "
    "together: `domain=ffhq`.",
    "editability": "Training that keeps the codes of the encoder in the region where edits work: "
    "`editability=e4e encoder=e4e`.",
    "embed": "Where `psp-predict` and `psp-evaluate` get codes from: `embed=optimize`.",
    "encoder": "The network that is trained: `encoder=gradual`.",
    "experiment": "Complete recipes. A recipe selects a domain, a task and loss terms and sets their numbers: "
    "`experiment=toyfaces_inversion`. Anything on the command line overrides it.",
    "generator": "The frozen StyleGAN2 that draws the output: `generator=file generator.path=FILE`.",
    "hparams_search": "Searches for good settings: `psp-train -m hparams_search=optuna`.",
    "hydra": "Where runs are written, and the text of `psp-train --help` and `psp-doctor data --help`.",
    "hydra/launcher": "Where the jobs of a sweep run: `psp-train -m hydra/launcher=submitit_slurm`. Without it, they "
    "run one after the other.",
    "hydra/sweeper": "A search, which `hparams_search=NAME` selects: `hydra.sweeper.n_trials=20`.",
    "hydra/sweeper/pruner": "What ends bad trials of a search early: `hydra/sweeper/pruner=median`.",
    "hydra/sweeper/sampler": "How a search chooses values: `hydra/sweeper/sampler=random`.",
    "logger": "Where the logged numbers go: `logger=tensorboard`. All but `none` also write the CSV file.",
    "loss": "Terms of the training objective. Select several as a list, `loss=[l2,lpips,id]`; each key of a selected "
    "term can be set, for example `loss.lpips.weight=0.4`.",
    "metric": "Values computed at each validation in addition to the losses, and by `psp-evaluate`: "
    "`metric=[mse,psnr]`.",
    "model": "How the network starts and how it is trained.",
    "optimizer": "The optimizer of the encoder: `optimizer=adam optimizer.lr=1e-3`.",
    "paths": "Where runs are written.",
    "refine": "What `psp-predict` and `psp-evaluate` do with codes before they are decoded: `refine=optimize`.",
    "refiner": "A network that adds to a feature map of the generator what the codes cannot express: "
    "`refiner=features`.",
    "task": "What the source is and how it becomes a tensor: `task=sketch2face`.",
    "trainer": "Devices, precision, number of steps: `trainer=ddp trainer.max_steps=10000`.",
    "generator_training": "The keys of `psp-train-generator` that belong to no group, and the groups it starts from. "
    "Groups that have no page below are those of `psp-train`.",
    "generator_training/callbacks": "Checkpoints, exported generators and sample grids of `psp-train-generator`.",
    "generator_training/domain": "The images that the generator learns: `domain=folder data.root=DIR` or "
    "`domain=toyfaces`.",
    "generator_training/hydra": "Where runs are written, and the text of `psp-train-generator --help`.",
    "generator_training/model": "Penalties, weight averaging and augmentation of `psp-train-generator`.",
    "generator_training/network": "Widths and depths of generator and discriminator: `network=toyfaces`.",
    "generator_training/optimizer": "The optimizer of both networks.",
    "generator_training/trainer": "Devices and number of steps of `psp-train-generator`.",
    "evaluation/data": "The images that `psp-evaluate` measures on: `data=folder data.root=DIR`.",
}
COMMANDS = {
    "train": "train.yaml",
    "predict": "predict.yaml",
    "doctor": "doctor.yaml",
    TRAINING: f"{TRAINING}/train_generator.yaml",
    EVALUATION: f"{EVALUATION}/evaluate.yaml",
}
TITLES = {
    "train": "psp-train", "predict": "psp-predict", "doctor": "psp-doctor data", TRAINING: "psp-train-generator",
    EVALUATION: "psp-evaluate",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A key as it is written on a command line, its default and its comment."""

    key: str
    default: str
    comment: str


@dataclass
class ConfigFile:
    """What one YAML file says.

    Attributes:
        path: the file.
        text: the comment at its top.
        composed: entries of its defaults list, each with its comment.
        settings: its keys.
    """

    path: Path
    text: str = ""
    composed: list[tuple[str, str]] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)


class Comments:
    """The comments of a YAML text, by line. PyYAML drops them, so they are found behind its tokens."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.used: dict[int, int] = {}  # line -> column behind its last token
        for token in yaml.scan(text):
            start, end = token.start_mark, token.end_mark
            if end.index > start.index:
                block = getattr(token, "style", None) in ("|", ">")
                for line in range(start.line, end.line if block else end.line + 1):
                    whole = block or line < end.line
                    self.used[line] = max(self.used.get(line, 0), len(self.lines[line]) if whole else end.column)

    def own(self, line: int) -> str | None:
        """Return the comment at the end of a line, without its #; None if there is none."""
        column = self._column(line)
        return None if column is None else self.lines[line][column:].lstrip("#").strip()

    def _column(self, line: int) -> int | None:
        """Return the column of a line's #."""
        start = self.used.get(line, 0)
        rest = self.lines[line][start:] if 0 <= line < len(self.lines) else ""
        return start + len(rest) - len(rest.lstrip()) if rest.lstrip().startswith("#") else None

    def _alone(self, line: int, column: int | None) -> bool:
        """Return whether a line has a comment only, at this column."""
        return line not in self.used and column is not None and self._column(line) == column

    def at(self, line: int, column: int) -> str:
        """Return the comment of a key or list entry: the lines above it, the end of its line, aligned lines below it.

        Args:
            line: its line.
            column: its column. Comments above it belong to it if they have the same one.
        """
        first = line
        while self._alone(first - 1, column):
            first -= 1
        if first <= min(self.used):  # the comment at the top belongs to the file
            first = line
        last = line
        while self._alone(last + 1, self._column(line)):
            last += 1
        parts = [self.own(n) for n in range(first, last + 1)]
        return " ".join(part for part in parts if part)

    def top(self) -> Iterator[str]:
        """Yield the comment lines above the first key."""
        for line in range(min(self.used, default=len(self.lines))):
            yield self.own(line) or ""


def read(path: Path) -> ConfigFile:
    """Read one configuration file."""
    text = path.read_text(encoding="utf-8")
    comments = Comments(text)
    parts = path.relative_to(CONF).parts[:-1]
    package = ".".join(parts[1:] if parts[:1] in ((TRAINING,), (EVALUATION,)) else parts)
    found = ConfigFile(path)
    for line in comments.top():
        if match := re.fullmatch(r"@package (\S+)", line):
            package = "" if match[1] == "_global_" else match[1]
        else:
            found.text += f"{line}\n"
    node = yaml.compose(text)
    if isinstance(node, yaml.MappingNode):
        _read_mapping(node, package, text, comments, found)
    return found


def _read_mapping(node: yaml.MappingNode, prefix: str, text: str, comments: Comments, found: ConfigFile) -> None:
    for key, value in node.value:
        name = f"{prefix}.{key.value}".lstrip(".")
        comment = comments.at(key.start_mark.line, key.start_mark.column)
        if key.value == "defaults" and key.start_mark.column == 0:
            for item in value.value:
                place = item.start_mark.line, item.start_mark.column - 2  # of its dash
                found.composed.append((_entry(item, text), comments.at(*place)))
        elif isinstance(value, yaml.MappingNode) and value.value:
            if comment:
                found.settings.append(Setting(name, "", comment))
            _read_mapping(value, name, text, comments, found)
        else:
            found.settings.append(Setting(name, _default(value, text), comment))


def _entry(item: yaml.Node, text: str) -> str:
    """Return an entry of a defaults list as it is written."""
    if isinstance(item, yaml.MappingNode):
        return ", ".join(f"{key.value}: {_default(value, text)}" for key, value in item.value)
    return _default(item, text)


def _default(value: yaml.Node, text: str) -> str:
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        return "(several lines)"
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        return "[" + ", ".join(_default(item, text) for item in value.value) + "]"
    return text[value.start_mark.index : value.end_mark.index]


def files(page: str) -> list[ConfigFile]:
    """Return the configuration files of a page."""
    if page in COMMANDS:
        return [read(CONF / COMMANDS[page])]
    return [read(path) for path in sorted((CONF / page).glob("*.yaml"))]


def names() -> list[str]:
    """Return the pages: those of the commands, then a page for each folder with configuration files.

    Raises:
        ValueError: a folder has no entry in `TEXTS`, or an entry has no folder.
    """
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {".", TRAINING, EVALUATION}
    pages = {*COMMANDS, *folders}
    if pages != set(TEXTS):
        raise ValueError(f"docs_site/settings.py: TEXTS and conf/ differ in {', '.join(sorted(pages ^ set(TEXTS)))}.")
    return [name for name in TEXTS]


def uri(page: str) -> str:
    """Return where a page is in the site."""
    return f"settings/{page}.md"


def title(page: str) -> str:
    """Return the name of a page."""
    head, _, rest = page.partition("/")
    return TITLES.get(page, rest if head in (TRAINING, EVALUATION) else page)


def render(page: str) -> str:
    """Return the Markdown of a page."""
    parts = [f"# {title(page)}", TEXTS[page]]
    for file in files(page):
        path = file.path.relative_to(ROOT).as_posix()
        if page not in COMMANDS:
            parts.append(f"## {file.path.stem}")
        parts += [_paragraphs(file.text), f"File: `{path}`"]
        if file.composed:
            parts += ["Composed of, in this order:", _list(file.composed)]
        if file.settings:
            parts.append(_table(file.settings, file.path.stem))
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(text: str) -> str:
    """Return a comment as HTML: it is no Markdown."""
    return "".join(f"<p>{_html(part.strip())}</p>\n" for part in text.split("\n\n") if part.strip())


def _html(text: str) -> str:
    """Return plain text as HTML, with `code` in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _code(text: str, anchor: str = "") -> str:
    return f"<code{anchor}>{html.escape(text, quote=False)}</code>"


def _list(composed: list[tuple[str, str]]) -> str:
    """Return the entries of a defaults list as HTML."""
    lines = [f"<li>{_code(entry)}{': ' if comment else ''}{_html(comment)}</li>" for entry, comment in composed]
    return "\n".join(["<ul>", *lines, "</ul>"])


def _table(rows: list[Setting], stem: str) -> str:
    """Return settings as an HTML table, in which comments may have any character; extra.css stacks its cells on narrow
    screens."""
    lines = ['<div class="settings"><table>', "<thead><tr><th>Key</th><th>Default</th><th>Meaning</th></tr></thead>"]
    for row in rows:
        default = _code(row.default) if row.default else ""
        anchor = f' id="{stem}-{row.key}"'
        lines.append(f"<tr><td>{_code(row.key, anchor)}</td><td>{default}</td><td>{_html(row.comment)}</td></tr>")
    return "\n".join([*lines, "</table></div>"])


def render_index() -> str:
    """Return the Markdown of the page that lists the others."""
    lines = [
        "# Settings",
        "",
        "`psp-train`, `psp-predict`, `psp-evaluate`, `psp-doctor data` and `psp-train-generator` compose their "
        "settings from the YAML files below `conf/` (in an installed package: `psp_lightning/conf`). These pages are "
        "generated from those files and show every key with its default and its comment.",
        "",
        "- `KEY=VALUE` sets a key, `GROUP=NAME` selects another file of a group, `+KEY=VALUE` adds a key that does "
        "not exist.",
        "- `--cfg job` prints every key with its value and runs nothing. `--help` explains the most used ones.",
        "- `???` as a default means that the key must be given, `null` that it is not set, `${other.key}` that it "
        "takes the value of another key.",
        "- A key that starts and ends with `_`, such as `_target_`, tells Hydra which class a group builds.",
        "",
    ]
    groups: dict[str, list[str]] = {}
    for name in names():
        groups.setdefault(_heading(name), []).append(f"- [{title(name)}]({name}.md): {TEXTS[name]}")
    for heading, entries in groups.items():
        lines += [f"## {heading}", "", *entries, ""]
    return "\n".join(lines)


def _heading(page: str) -> str:
    """Return what a page belongs to."""
    return "Commands" if page in COMMANDS else f"Groups of {TITLES.get(page.partition('/')[0], TITLES['train'])}"


def pages() -> dict[str, str]:
    """Return every generated page, by its place in the site."""
    return {"settings/index.md": render_index(), **{uri(name): render(name) for name in names()}}


def nav() -> list[object]:
    """Return the pages as an entry of MkDocs's navigation."""
    own = [name for name in names() if name in COMMANDS]
    groups: dict[str, list[object]] = {}
    for name in names():
        if name not in COMMANDS:
            groups.setdefault(_heading(name), []).append({title(name): uri(name)})
    entries: list[object] = [{"Overview": "settings/index.md"}, *({title(name): uri(name)} for name in own)]
    return entries + [{heading: list(places)} for heading, places in groups.items()]

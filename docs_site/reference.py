"""Generate the pages of the API reference: every public name of the packages that users call."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "psp_lightning"


@dataclass(frozen=True)
class Group:
    """A page.

    Attributes:
        title: its heading.
        text: its first paragraph.
        packages: packages and modules whose names it has; the longest match decides.
    """

    title: str
    text: str
    packages: tuple[str, ...]


GROUPS = {
    "networks": Group("Networks", "Encoders, generator, their interfaces and registries.", ("models",)),
    "loading": Group(
        "Loading and saving",
        "Networks from files, weight files of this library, files of other projects, public weights.",
        ("loading", "checkpoints.weight_files", "importers", "zoo"),
    ),
    "data": Group("Data", "Tasks as data modules, sources, stores, label maps, masks, transforms.", ("data",)),
    "toyfaces": Group("Drawn faces", "The faces of `domain=toyfaces`.", ("data.toyfaces",)),
    "losses": Group("Losses", "Terms of the training objective and their weighted sum.", ("losses",)),
    "metrics": Group("Metrics", "What a validation measures in addition to the losses.", ("metrics",)),
    "training": Group(
        "Training", "The Lightning modules of both trainings, their callbacks, loggers and optimizer.", ("lit", "optim")
    ),
    "inference": Group(
        "Inference", "Prediction, fast forms of trained networks, export, projection.", ("inference", "lit.prediction")
    ),
    "latents": Group("Latent codes", "Codes that belong to a generator, and their files.", ("latents",)),
    "utils": Group(
        "Utilities",
        "Errors, 8-bit images, reproducible products.",
        ("utils.errors", "utils.images", "utils.reproducibility"),
    ),
}
# Tables that user code looks names up in. Other constants are described where they are used.
REGISTRIES = ("DATAMODULES", "EMBEDDINGS", "ENCODERS", "GENERATORS", "LOSSES", "METRICS", "RECORDS", "SOURCES")
ALIAS = re.compile(r"[A-Z]\w*[a-z]\w*")  # of types: StoreLike, Noise
# Not in the reference: docs/architecture.md describes these.
INTERNAL = ("_conf", "build", "checkpoints", "cli", "ops", "utils")


def modules() -> dict[str, Path]:
    """Return every module below the package by its name without the package's."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if name := ".".join(part for part in parts if part != "__init__"):
            found[name] = path
    return found


def group_of(module: str) -> str | None:
    """Return the page of a module, None if it is internal.

    Raises:
        ValueError: neither `GROUPS` nor `INTERNAL` has it.
    """
    owners = {package: name for name, group in GROUPS.items() for package in group.packages}
    owners |= {package: "" for package in INTERNAL if package not in owners}
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (package := ".".join(parts[:n])) in owners:
            return owners[package] or None
    raise ValueError(f"docs_site/reference.py: neither GROUPS nor INTERNAL has {module}.")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path: Path) -> list[str]:
    """Return the public classes, functions, type aliases and registries that a module defines."""
    tree = _tree(path)
    names = [
        node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
    ]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("TypeVar", "ParamSpec")
            if isinstance(target, ast.Name) and not variable and ALIAS.fullmatch(target.id) or _is_registry(target):
                names.append(ast.unparse(target))
    return names


def _is_registry(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id in REGISTRIES


def exported(path: Path) -> dict[str, str]:
    """Return the public names that a package imports from its modules: name to the full path of its definition."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("psp_lightning.")
        for alias in node.names
        if alias.asname == alias.name or path.parent != SOURCE  # `X as X` exports in the lazy top-level package
    }


def public() -> dict[str, str]:
    """Return the names of the package itself: name to the full path of its definition."""
    found, places = {}, modules()
    for name, path in exported(SOURCE / "__init__.py").items():
        module = path.removeprefix("psp_lightning.").rpartition(".")[0]
        is_package = places[module].name == "__init__.py"
        found[name] = exported(places[module]).get(name, path) if is_package else path
    return found


def entries(name: str) -> dict[str, list[str]]:
    """Return what a page documents: module to the names that it defines."""
    found = {module: defined(path) for module, path in modules().items() if group_of(module) == name}
    return {module: names for module, names in found.items() if names}


def documented() -> set[str]:
    """Return the full path of every name that has an entry on one of the pages of `GROUPS`."""
    return {
        f"psp_lightning.{module}.{entry}"
        for name in GROUPS
        for module, names in entries(name).items()
        for entry in names
    }


def _entry(path: str) -> str:
    return f"::: {path}\n    options:\n      heading_level: 3\n"


def render(name: str) -> str:
    """Return the Markdown of a page."""
    group = GROUPS[name]
    parts = [f"# {group.title}", group.text]
    found = modules()
    known = documented()
    for module in (module for module in found if group_of(module) == name and found[module].stem == "__init__"):
        if names := {short: path for short, path in exported(found[module]).items() if path in known}:
            links = ", ".join(f"[`{short}`][{path}]" for short, path in sorted(names.items()))
            parts.append(f"Import from `psp_lightning.{module}`: {links}.")
    for module, names in entries(name).items():
        summary = (ast.get_docstring(_tree(found[module])) or "").split("\n\n")[0].replace("\n", " ")
        heading = f"psp_lightning.{module}".replace(".", ".<wbr>")  # where narrow screens break it
        parts += [f"## {heading}", summary]
        parts += [_entry(f"psp_lightning.{module}.{entry}") for entry in names]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_index() -> str:
    """Return the Markdown of the page with the names of the package itself."""
    known = documented()
    names = public()
    parts = [
        "# API reference",
        "Generated from the docstrings. Names that start with an underscore, the commands (`cli`, `build`) and the "
        "kernels (`ops`) are not part of the interface.",
        "Import from `psp_lightning`:",
        "\n".join(f"- [`{name}`][{path}]" for name, path in sorted(names.items())),
        "Pages:",
        "\n".join(f"- [{group.title}]({name}.md): {group.text}" for name, group in GROUPS.items()),
    ]
    if rest := sorted(path for path in names.values() if path not in known):
        parts += ["## psp_lightning", *(_entry(path) for path in rest)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return every generated page, by its place in the site."""
    return {"reference/index.md": render_index(), **{f"reference/{name}.md": render(name) for name in GROUPS}}


def nav() -> list[object]:
    """Return the pages as an entry of MkDocs's navigation."""
    return [
        {"Overview": "reference/index.md"},
        *({group.title: f"reference/{name}.md"} for name, group in GROUPS.items()),
    ]

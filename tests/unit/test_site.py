"""The documentation site: every public name and every configuration key has an entry, nothing comes from elsewhere."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import psp_lightning

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs")

from docs_site import hooks, reference, settings  # noqa: E402

# --- the API reference


def entries() -> set[str]:
    return {path for text in reference.pages().values() for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


def test_every_module_has_a_page_or_is_internal() -> None:
    for module in reference.modules():
        reference.group_of(module)
    for name, group in reference.GROUPS.items():
        assert reference.entries(name), f"the page {name} is empty"
        for package in group.packages:
            assert package in reference.modules(), f"{package} of the page {name} does not exist"


def test_every_public_name_has_an_entry() -> None:
    found = entries()
    assert set(reference.public()) == set(psp_lightning.__all__) - {"__version__"}
    assert set(reference.public().values()) <= found
    for package in ("losses", "metrics", "data.toyfaces"):
        module = importlib.import_module(f"psp_lightning.{package}")
        exported = reference.exported(Path(module.__file__))
        assert set(exported) == set(module.__all__)
        assert set(exported.values()) <= found, set(exported.values()) - found


def test_every_name_that_the_documents_import_has_an_entry() -> None:
    found, names = entries(), set()
    known = {f"psp_lightning.{name}" for name in reference.modules()}
    aliases = {f"psp_lightning.{name}": path for name, path in reference.public().items()}
    for package in ("losses", "metrics", "data.toyfaces", "lit.callbacks"):
        path = reference.modules()[package]
        aliases |= {f"psp_lightning.{package}.{name}": target for name, target in reference.exported(path).items()}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```python[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("psp_lightning"):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert len(names) > 10
    lacking = {name for name in names if aliases.get(name, name) not in found | known}
    assert not lacking, f"shown in the documents, but not in the reference: {sorted(lacking)}"


# --- the settings


def leaves(node: Any, prefix: str) -> Iterator[str]:
    for key, value in node.items():
        name = f"{prefix}.{key}".lstrip(".")
        if isinstance(value, dict) and value:
            yield from leaves(value, name)
        elif name.rpartition(".")[2] != "defaults":
            yield name


@pytest.mark.parametrize("page", settings.TEXTS)
def test_every_key_has_a_line(page: str) -> None:
    text = settings.render(page)
    for file in settings.files(page):
        content = yaml.safe_load(file.path.read_text()) or {}
        package = re.search(r"^# @package (\S+)$", file.path.read_text(), re.MULTILINE)
        own = page.removeprefix(f"{settings.TRAINING}/").removeprefix(f"{settings.EVALUATION}/")
        group = "" if page in settings.COMMANDS else own.replace("/", ".")
        prefix = group if package is None else package[1].replace("_global_", "")
        keys = set(leaves(content, prefix))
        shown = set(re.findall(rf'<code id="{file.path.stem}-([^"]+)">', text))
        assert keys <= shown, f"{file.path.name}: {sorted(keys - shown)}"
        for entry in content.get("defaults", ()):
            first = next(iter(entry)) if isinstance(entry, dict) else entry
            assert any(line.startswith(first) for line, _ in file.composed), f"{file.path.name}: {entry}"


def test_every_folder_has_a_page() -> None:
    assert set(settings.names()) == set(settings.TEXTS)
    assert {uri for uri in settings.pages()} == {"settings/index.md", *(settings.uri(n) for n in settings.TEXTS)}


def test_comments_and_defaults_are_those_of_the_files() -> None:
    predict = {s.key: s for s in settings.files("predict")[0].settings}
    assert predict["format"].default == "png" and predict["format"].comment.endswith("png | jpg | webp")
    assert "(the last two: autocast)" in predict["precision"].comment, "a comment of several lines"
    assert predict["latents"].comment.count("OUTPUT/latents") == 2, "a comment above the key"
    assert predict["ckpt"].default == "???"
    loss = {s.key: s for file in settings.files("loss") for s in file.settings}
    assert loss["loss.lpips.weight"].default == "0.8" and "in the sum" in loss["loss.lpips.weight"].comment
    callbacks = {s.key: s for s in settings.files("callbacks")[0].settings}
    assert callbacks["callbacks.best.monitor"].default == "val/loss" and callbacks["callbacks.best"].comment
    domain = {file.path.stem: file for file in settings.files("domain")}
    assert ("/encoder: gradual", "") in domain["ffhq"].composed and "domain.identity" in {
        s.key for s in domain["ffhq"].settings
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a: "x # y"  # the comment\n', ("a", '"x # y"', "the comment")),
        ("a:\n  b: [1, 2]\n", ("a.b", "[1, 2]", "")),
        ("a: |\n  text\n  # no comment\nb: 1\n", ("a", "(several lines)", "")),
        ("a: 1  # first\n      # second\n# of the next\nb: 2\n", ("a", "1", "first second")),
        ("a: 1  # first\n      # second\n# of the next\nb: 2\n", ("b", "2", "of the next")),
        ("a:  # of a\n  # of b\n  b: 2\n", ("a", "", "of a")),
        ("a:  # of a\n  # of b\n  # too\n  b: 2\n", ("a.b", "2", "of b too")),
        ("# of the file\na: 1\n", ("a", "1", "")),
        ("a:\n  - x\n  - y\n", ("a", "[x, y]", "")),
    ],
)
def test_reading_of_comments(
    text: str, expected: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "CONF", tmp_path)
    (tmp_path / "file.yaml").write_text(text)
    assert settings.Setting(*expected) in settings.read(tmp_path / "file.yaml").settings


# --- links and blocks


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "[a](docs/toyfaces.md#what-they-reach)", "[a](toyfaces.md#what-they-reach)"),
        ("README.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("README.md", "[a](LICENSE)", "[a](files/LICENSE.txt)"),
        ("README.md", "[a](https://example.org/docs/x.md)", "[a](https://example.org/docs/x.md)"),
        ("docs/speed.md", "[a](../CHANGELOG.md)", "[a](changelog.md)"),
        ("docs/speed.md", "[a](#figures)", "[a](#figures)"),
        ("docs/speed.md", "```\n[a](../CHANGELOG.md)\n```", "```\n[a](../CHANGELOG.md)\n```"),
        ("docs/x.md", "```python my_losses.py\n```", '```python title="my_losses.py"\n```'),
        ("docs/x.md", "These:\n- one\n- two", "These:\n\n- one\n- two"),
    ],
)
def test_translation(source: str, text: str, expected: str) -> None:
    assert hooks.translate(text, source) == expected + "\n"


# --- the site


@pytest.mark.slow
def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    loaded = (
        r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//[^"']+|<link[^>]+href=["'](?:https?:)?//[^"']+"""
    )
    for name, text in pages.items():
        assert not (found := re.search(loaded, text)), f"{name} loads {found[0]}"
        assert "::: " not in text, f"{name} has an entry that was not rendered"
    assert "reference/losses.html" in pages and "settings/loss.html" in pages
    for path in entries():
        assert any(f'id="{path}"' in text for name, text in pages.items() if name.startswith("reference/")), path
    styles = "".join(path.read_text() for path in tmp_path.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)

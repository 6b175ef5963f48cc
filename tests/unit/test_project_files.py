"""The files for contributors: they parse, and what they name exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import psp_lightning

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
YAML = [
    ".pre-commit-config.yaml",
    "CITATION.cff",
    "mkdocs.yml",
    ".github/workflows/ci.yml",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))),
]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))


@pytest.mark.parametrize("name", YAML)
def test_yaml_files_parse(name: str) -> None:
    assert isinstance(load(name), dict)


def test_workflow_runs_make_targets_that_exist() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    assert set(jobs) == {"lint", "test", "docs"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    named = {name for step in steps for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))}
    assert {"lint", "test", "docs", "install"} <= named <= targets(), named - targets()
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert "CONSTRAINTS ?=" in (ROOT / "Makefile").read_text()


def test_workflow_tests_the_oldest_torch_and_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrix = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert f">={matrix['python'][0]}" == project["requires-python"] and len(matrix["python"]) == 2
    assert any(item.startswith(f"torch>={matrix['torch'][0]},") for item in project["dependencies"])


def test_help_names_every_make_target() -> None:
    help_text = re.search(r"^help:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert help_text
    named = set(re.findall(r"make ([\w-]+)", help_text[1]))
    assert targets() - named <= {"help", "clean"}, "make help lacks a target"


def test_citation_has_what_the_format_requires() -> None:
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The psp_lightning authors"}]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2008.00951" in str(paper["identifiers"])
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert citation["version"] == released[0], "CITATION.cff names the newest released version"
    assert f"## [{psp_lightning.__version__}]" in changelog


def test_hooks_use_the_projects_own_tools() -> None:
    (local,) = load(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")


def test_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"all", "dev", "docs", "export", "demo", "download", "tensorboard", "sweep", "slurm", "joblib"} == set(
        extras
    )
    for name in ("all", "dev"):
        named = {part for item in extras[name] for part in re.findall(r"\[([\w,]+)\]", item) if "psp-lightning" in item}
        assert {part for group in named for part in group.split(",")} <= set(extras)


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:conf|tests|docs|src|docs_site)/[\w./]+)`", text):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets()

"""Names and paths on command lines: Hydra reads the text that was typed, and a resume finds a run of any name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from psp_lightning.cli.resume import with_resume
from psp_lightning.cli.settings import plain, quote, quote_text
from psp_lightning.lit.run_folder import LAST

NUMBERS = ["2024_01_05", "1.10", "1e3", "007", "0x1f", "1_000", "true", "nan", "inf", "12:30"]
GRAMMAR = [
    "a b", " a", "k=v", "x,y", "[z]", "{a:b}", "(x)", "choice(a,b)", "it's", "'", "a\"b", "a\\b", "a\\", "a\\'b", "é",
    "日本", "a#b", "50%", "a!b", "a:b", "x@y", "$HOME", "*.png", "[0-9].png", "a\tb", "\"a' b",
]  # fmt: skip


def read(argument: str) -> object:
    """Return the value that Hydra reads."""
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("text", NUMBERS + GRAMMAR)
def test_names_are_text(text: str) -> None:
    for key in ("run", "ckpt", "+data.root", "experiment"):
        assert read(quote_text([f"{key}={text}"])[0]) == text
    assert read(f"run={quote(text)}") == text == plain(quote(text))
    assert read(quote_text([f"run={quote(text)}"])[0]) == text, "quotes of Hydra's grammar are not part of the name"


def test_other_settings_are_left_to_hydra() -> None:
    for argument in (
        "seed=1e3",
        "loss=[l2,id]",
        "run=null",
        "run=",
        "run=inversion-1",
        "data.limit=null",
        "~metric.mse",
    ):
        assert quote_text([argument]) == [argument]
    assert read(quote_text(["run=${task.name}_1"])[0]) == "${task.name}_1"


def test_options_come_before_settings():
    """Hydra's parser rejects settings on both sides of an option."""
    given = ["task=inversion", "--config-dir", "own", "seed=1", "-m", "optimizer.lr=1e-4,1e-3", "+new=1", "--cfg=job"]
    assert quote_text(given) == [
        "--config-dir", "own", "-m", "--cfg=job", "task=inversion", "seed=1", "optimizer.lr=1e-4,1e-3", "+new=1"
    ]  # fmt: skip
    given = ["run=a", "-cd", "key=1", "-m", "--config-n", "run=1", "seed=1"]
    assert quote_text(given) == ["-cd", "key=1", "-m", "--config-n", "run=1", "run=a", "seed=1"], "values with ="


@pytest.mark.parametrize("value", ["~/my photos", "'~/my photos'", '"~/my photos"'])
def test_home_is_expanded(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/Zoë, 1")
    assert read(quote_text([f"data.root={value}"])[0]) == "/home/Zoë, 1/my photos"
    assert read(quote_text(["data.root=a~b"])[0]) == "a~b"


def test_commas_separate_the_values_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zoe")

    def values(argument: str) -> list[str]:
        changed = quote_text(["-m", argument])[1]
        return [
            read(f"key={value}") for value in OverridesParser.create().parse_override(changed).sweep_string_iterator()
        ]

    assert values("run=2024_01_05,1.10,it's") == ["2024_01_05", "1.10", "it's"]
    assert values("data.root=~/a b,é") == ["/home/zoe/a b", "é"]
    assert values("data.root='a,b',c") == ["a,b", "c"]
    assert values("data.root='~/a',\"~/b,c\"") == ["/home/zoe/a", "/home/zoe/b,c"]
    assert values("data.root=photos (1),[2] photos,{3}") == ["photos (1)", "[2] photos", "{3}"]
    assert values("run='a b', \"c,d\", e") == ["a b", "c,d", "e"], "as Hydra reads the values of other settings"
    assert quote_text(["-m", "run=a,,b", "name=a,"])[1:] == ["run=a,,b", "name=a,"], "Hydra rejects an empty value"
    assert values("hydra.sweep.subdir=2024_01,b[1]") == ["2024_01", "b[1]"]
    for name in ("photos(1)", "[x]", "{x}", "~/x", "'~/x'", "2024_01"):  # one value
        assert read(quote_text(["-m", f"run={name}"])[1]) == plain(name)
    assert values("run=choice(a,b)") == ["a", "b"]
    assert values("task=inversion,superres") == ["inversion", "superres"]


# --- resume


def make_run(folder: Path, settings: list[str]) -> Path:
    """Write what a resume reads of a run; return its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    (folder / "config.yaml").touch()
    (folder / LAST).touch()
    return folder / LAST


def settings(arguments: list[str]) -> dict[str, object]:
    """Return the values that Hydra reads on a command line."""
    return {argument.partition("=")[0]: read(argument) for argument in arguments}


@pytest.mark.parametrize("name", [*NUMBERS, *GRAMMAR, "${x}"])
def test_a_run_of_any_name_is_continued(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = name.replace("${", "\\${")
    checkpoint = make_run(tmp_path / "runs" / "inversion" / name, ["seed=3", f"run={quote(given)}"])
    for arguments in (
        ["resume=auto"],
        ["resume=auto", f"run={given}"],
        ["resume=auto", f"run={quote(given)}"],
        [f"resume=runs/inversion/{name}"],
        [f"resume={quote(os.fspath(checkpoint))}"],
    ):
        found = settings(with_resume(arguments))
        assert found == {
            "seed": 3,
            "run": given,
            "hydra.run.dir": str(checkpoint.parent.parent).replace("${", "\\${"),
            "resume": str(checkpoint).replace("${", "\\${"),
        }


def test_auto_looks_where_the_settings_put_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "1e3.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /task: superres\n"
    )
    make_run(tmp_path / "runs" / "inversion" / "newer", [])
    cases = {
        "my runs/inversion/a": ["paths.runs=my runs"],
        "2024_01/inversion/a": ["paths.runs=2024_01", "run=a"],
        "runs/sketch2face/a": ["experiment=toyfaces_sketch2face"],
        "runs/superres/a": ["--config-dir", "own", "experiment=1e3"],
        "more/superres/a": ["--config-dir=own", "experiment=1e3", "paths.runs=more"],
        "runs/seg2face/a": ["-c", "job", "task=seg2face"],
    }
    for place, arguments in cases.items():
        checkpoint = make_run(tmp_path / place, [])
        found = [argument for argument in with_resume(["resume=auto", *arguments]) if argument.startswith("resume=")]
        assert settings(found) == {"resume": str(checkpoint)}, place
    checkpoint = make_run(tmp_path / "runs" / "inversion" / "newer" / "b" / "c", [])
    assert settings(with_resume(["resume=auto"]))["resume"] == str(checkpoint), "a name with slashes"
    assert with_resume(["resume=auto", "run=new one"]) == ["run=new one"], "there is no such run"
    assert with_resume(["resume=auto", "task=toonify"]) == ["task=toonify"]
    import psp_lightning.cli.train_generator  # noqa: F401  # registers the resolver of the search path

    checkpoint = make_run(tmp_path / "runs" / "generator" / "a b", [])
    found = settings(with_resume(["resume=auto", "run=a b"], "generator_training/train_generator"))
    assert found["resume"] == str(checkpoint)

"""psp-demo: the page it writes, how it treats existing folders, and the settings it rejects."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

SOURCES = {
    "inversion": (3, {"kind": "rgb", "size": 64}),
    "sketch2face": (1, {"kind": "sketch", "size": 64}),
    "seg2face": (19, {"kind": "labels", "size": 64, "n_classes": 19}),
    "superres": (3, {"kind": "lowres", "size": 64, "factors": [8]}),
    "refined": (3, {"kind": "rgb", "size": 64}),
}
VOID = {"meta", "img", "br", "hr", "link"}


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return settings of psp-demo that name untrained networks."""
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.psp import PSP
    from psp_lightning.models.refiner import FeatureRefiner
    from psp_lightning.models.stylegan2 import Generator

    folder = tmp_path_factory.mktemp("networks")
    settings = []
    for task, (channels, source) in SOURCES.items():
        torch.manual_seed(0)
        generator = Generator.seeded(0, output_size=64, style_dim=64, n_mapping=4, channel_base=1536, max_channels=16)
        encoder = GradualStyleEncoder(generator.n_styles, 64, channels, 64, blocks=(1, 1, 1, 1), width=8)
        refiner = FeatureRefiner(16, 16, 64, width=4, blocks=1) if task == "refined" else None
        if refiner is not None:
            torch.nn.init.normal_(refiner.change.weight, std=0.1)
        net = PSP(encoder, generator, generator.latent_average(64), source=source, refiner=refiner)
        content = {"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}
        torch.save(content, folder / f"{task}.ckpt")
        settings.append(f"{task}={folder / task}.ckpt")
    return settings


SMALL = (
    "train=trainer=cpu generator=seeded generator.max_channels=16 encoder.width=8 loss=[l2] data.val.n=4 "
    "data.batch_size=2 trainer.enable_progress_bar=false"
)


class Page(HTMLParser):
    """A parser that checks that tags are balanced, and collects pictures, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            assert values.get("alt"), f"{values.get('src')} has no alternative text"
            self.pictures.append(unquote(values["src"] or ""))
        if tag == "a":
            self.links.append(unquote(values["href"] or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<path/>`: opens and closes."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def check(out: Path, printed: str) -> Page:
    """Check that the page named by the last printed line is complete, with everything it shows."""
    last = Path(printed.strip().splitlines()[-1])
    assert last == (out / "index.html").resolve() and last.is_file(), f"the last line is not the page's path: {last}"
    page = Page(last.read_text(encoding="utf-8"))
    assert len(page.pictures) > 100
    for name in {*page.pictures, "demo.png"}:
        with Image.open(out / name) as image:
            assert any(low != high for low, high in image.convert("RGB").getextrema()), f"{name} is blank"
    for target in page.links:
        assert (out / target).exists(), f"the page links to {target}"
    return page


@pytest.mark.slow
def test_demo_twice(psp, networks: list[str], tmp_path: Path) -> None:
    out = tmp_path / "my demo"  # a name that a shell and Hydra would split
    done = psp("demo", f"out={out}", "steps=4", *networks, SMALL)
    assert done.code == 0, done.err
    page = check(out, done.out)
    for task in SOURCES:
        assert re.search(rf"^psp-predict .*{task}\.ckpt", page.text, re.MULTILINE), f"no command for {task}"
    commands = [line[2:] for line in done.out.splitlines() if line.startswith("$ ")]
    assert len(commands) == 10 and not [line for line in commands if line not in page.text], "page and terminal differ"
    assert "<svg role=" in (out / "index.html").read_text() and "validation loss" in page.text
    assert len(list((out / "mixing").glob("0_*.png"))) == 8
    stages = {(out / folder / "0.png").read_bytes() for folder in ("inversion", "refined", "refined_edited")}
    assert len(stages) == 3, "the refinement or the edit changes nothing"
    with Image.open(out / "demo.png") as sheet:
        assert 600 < sheet.width < 1000 and (out / "demo.png").stat().st_size < 700_000

    # the second demo takes the next free folder and does not touch the first
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = psp("demo", f"out={out}", "steps=2", "seed=101", *networks, SMALL)
    assert done.code == 0, done.err
    page = check(tmp_path / "my demo_2", done.out)
    assert "2 steps" in page.text and "4 steps" not in page.text
    faces = [tmp_path / name / "faces" / "CelebA-HQ-img" / "0.jpg" for name in ("my demo", "my demo_2")]
    assert faces[0].read_bytes() != faces[1].read_bytes(), "another seed must give other faces"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_failed_part_can_be_repeated(psp, networks: list[str], tmp_path: Path) -> None:
    """The files written before the failure are kept and do not stop the next demo from starting."""
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    for name in ("demo", "demo_2"):
        done = psp("demo", f"out={tmp_path / 'demo'}", "steps=2", *networks[1:], f"inversion={broken}", SMALL)
        assert done.code == 1 and "broken.ckpt" in done.err, done.err
        out = tmp_path / name
        assert (out / "faces" / "sketch" / "0.png").is_file() and not (out / "index.html").exists()


def test_a_missing_package_is_named(psp, networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = psp("demo", f"out={tmp_path / 'demo'}", *networks)
    assert done.code == 1 and "needs matplotlib: pip install 'psp-lightning[demo]'" in done.err, done.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ot=demo"], ["'ot=demo'", "Did you mean 'out'?"]),
        (["demo"], ["'demo' is not a setting", "out=demo"]),
        (["steps=many"], ["steps=many", "whole number"]),
        (["steps=0"], ["steps=0", "at least 1"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["seed=01"], ["seed=1 ", "trained on"]),
        (["out="], ["out=", "no value"]),
        (["train='a"], ["train='a", "quotation mark"]),
        (["superres=nowhere.ckpt"], ["nowhere.ckpt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(psp, networks: list[str], tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = psp("demo", *networks, *arguments)
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ") and all(word in done.err for word in words), done.err
    assert not any(tmp_path.iterdir()), "a mistake must leave no files"


def test_out_that_cannot_be_used(psp, networks: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = psp("demo", f"out={file}", *networks)
    assert done.code == 1 and done.err == f"error: out={file} is a file. Give a folder.\n"
    done = psp("demo", f"out={file / 'below'}", *networks)
    assert done.code == 1 and len(done.err.splitlines()) == 1 and str(file) in done.err, done.err


def test_help(psp) -> None:
    done = psp("demo", "--help")
    assert done.code == 0
    for word in ("out", "steps", "seed", "train", *SOURCES):
        explained = rf"^(\w+, )*{word}(, \w+)*  "  # at the start of a line, before the explanation
        assert re.search(explained, done.out, re.MULTILINE), f"the help does not explain {word}"

"""Fixtures that run the commands in this process (fast) or as subprocesses (as a user does)."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.machines import start as start

TINY = [
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.val_every=2",
    "trainer.enable_progress_bar=false",
    "data.batch_size=2",
    "data.val_batch_size=2",
    "data.val.n=3",
    "data.train.n=6",
    "model.latent_avg_samples=64",
    "callbacks.images.every_n_steps=2",
]


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images], shown = images.filter(i => i.complete && i.naturalWidth > 0);
  document.body.dataset.seen = JSON.stringify({images: images.length, shown: shown.length,
    width: (document.body.style.width ? document.body : document.documentElement).scrollWidth,
    plots: document.querySelectorAll("svg").length,
    addresses: images.map(i => i.src.slice(0, 10)), text: document.body.innerText});
})</script></body>"""


@pytest.fixture
def psp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function: `psp("train", "task=inversion")` runs psp-train in tmp_path, within this process."""

    def call(command: str, *arguments: str) -> Result:
        from hydra.core.global_hydra import GlobalHydra

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"psp-{command}", *map(str, arguments)])
        module = importlib.import_module(f"psp_lightning.cli.{command}")
        GlobalHydra.instance().clear()
        for handler in logging.getLogger().handlers[:]:  # of an earlier command, for a stream that is closed by now
            if type(handler) is logging.StreamHandler:
                logging.getLogger().removeHandler(handler)
        capfd.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def shell(tmp_path: Path) -> Command:
    """Return the function that `psp` returns, but for subprocesses, which use the tests' interpreter."""

    def call(command: str, *arguments: str, timeout: int = 300, cwd: Path = tmp_path, **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", f"psp_lightning.cli.{command}", *map(str, arguments)],
            cwd=cwd, capture_output=True, text=True, errors="surrogateescape", timeout=timeout,
            env={**os.environ, **env},
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def tiny() -> list[str]:
    """Return the settings of a run of two steps with two samples per batch."""
    return list(TINY)


@pytest.fixture
def place(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with photographs, from which modules can be imported as with PYTHONPATH=."""
    (tmp_path / "photos").mkdir()
    for i in range(2):
        (tmp_path / "photos" / f"face_{i}.jpg").write_bytes((photos / f"face_{i}.jpg").read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_modules() -> Iterator[None]:
    """Forget the modules and registrations that a page makes after the test."""
    from psp_lightning.losses import LOSSES
    from psp_lightning.metrics import METRICS
    from psp_lightning.models.registry import ENCODERS

    tables = (LOSSES, METRICS, ENCODERS)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def look(tmp_path: Path):
    """Return a function that opens a page in a browser and returns what it shows."""
    if BROWSER is None:
        pytest.skip("needs Chromium")

    def open_page(page: Path, width: int, dark: bool = False) -> dict:
        copy = tmp_path / "looked_at" / "page.html"  # without the files next to it
        copy.parent.mkdir(exist_ok=True)
        text = page.read_text(encoding="utf-8").replace("</body>", LOOK)
        if width < 500:  # Chromium's windows are not narrower
            text = text.replace("<body>", f'<body style="width: {width}px">')
        copy.write_text(text, encoding="utf-8")
        options = ["--blink-settings=preferredColorScheme=0"] if dark else []
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *options,
             f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900", "--dump-dom", copy.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not errors, errors
        found = re.search(r'data-seen="([^"]*)"', done.stdout)
        assert found, done.stderr[-2000:]
        return json.loads(
            found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        )

    return open_page

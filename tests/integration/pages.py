"""The pages of the documentation: read their blocks, and run them in order."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@dataclass
class Block:
    """A fenced block."""

    language: str
    file: str  # the file name after the language: the block is this file's content
    text: str
    line: int
    skipped: bool  # a comment before the block gives the reason


def blocks(path: Path) -> list[Block]:
    pattern = re.compile(r"(<!-- not run: [^\n]*-->\n+)?^```(\w+) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = path.read_text(encoding="utf-8")
    return [
        Block(match[2], match[3].strip(), match[4], text.count("\n", 0, match.start(4)) + 1, match[1] is not None)
        for match in pattern.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """Return the command lines of a shell block, without comments and leading variables."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.match(r"PYTHONPATH=", word)] for line in words if line]


def shortened(arguments: list[str], tiny: list[str]) -> list[str]:
    """Add the tests' small settings to a training command, but keep the command's own data and trainer."""
    tiny = [*tiny, "trainer.log_every_n_steps=1"]
    (data,) = [item for item in arguments if item.startswith("data=")] or ["data=toyfaces"]
    drawn, generated = data == "data=toyfaces", data == "data=generated"
    kept = [item for item in tiny if drawn or not item.startswith(("data.val.n", "data.train.n"))]
    if any(item.startswith("trainer=") for item in arguments):
        kept.remove("trainer=cpu")
    if not drawn and not generated:
        kept.append("data.num_workers=0")
    if generated:
        kept.append("data.limit=4")
    if "debug=overfit10" in arguments:  # two steps are too few to learn anything
        kept.append("callbacks.overfit=null")
    if any(item.startswith("resume=") for item in arguments):  # two more steps than the run has done
        kept += ["trainer.max_steps=4", "trainer.val_every=4"]
    return [*arguments, *kept]


def run_block(block: Block, psp, tiny: list[str]) -> None:
    for name, *arguments in commands(block):
        if name in ("mkdir", "tar"):
            subprocess.run([name, *arguments], check=True)
            continue
        command = name.removeprefix("psp-").replace("-", "_")
        assert name.startswith("psp-"), f"line {block.line}: {name} is not run by this test"
        if command == "train":
            arguments = shortened(arguments, tiny)
        elif command == "train_generator":
            steps = 4 if any(item.startswith("resume=") for item in arguments) else 2
            arguments = [*arguments, "trainer=cpu", f"trainer.max_steps={steps}", "data.batch_size=2"]
            arguments += ["data.num_workers=0", "trainer.enable_progress_bar=false"]
        elif command == "evaluate":
            arguments = [*arguments, "progress_bar=false", "accelerator=cpu", "timing=1"]
        elif command == "align":
            arguments = [*arguments, "progress_bar=false", "workers=0"]
        elif command == "doctor" and arguments[:1] == ["data"]:
            arguments = [*arguments, "trainer=cpu", "doctor.progress_bar=false", "doctor.images=2", "doctor.faces=8"]
            arguments += ["data.num_workers=0", "data.batch_size=2"]
        elif command == "predict":
            arguments = [*arguments, "progress_bar=false", "num_workers=0", "accelerator=cpu"]
        done = psp(command, *arguments)
        assert done.code == 0, f"line {block.line}: {name} {' '.join(arguments)}\n{done.err}"


def write_file(block: Block, place: Path) -> None:
    """Write the file that a block shows."""
    (place / block.file).parent.mkdir(parents=True, exist_ok=True)
    (place / block.file).write_text(block.text)


def quick(text: str) -> str:
    """Shorten the training runs of a Python block to two steps."""
    text = re.sub(r"(val_check_interval|steps)=\d+", r"\1=2", text)
    return text.replace("n=20_000", "n=8").replace("ToyFaces(seed=1)", "ToyFaces(seed=1, n=8)")


def run_page(name: str, psp, tiny: list[str], place: Path, change: Callable[[str], str] = str) -> dict[str, object]:
    """Write the files of a page and run its blocks, top to bottom; return the names that its Python defines.

    `change` changes the Python code, e.g. to train fewer steps.
    """
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(DOCS / name):
        if block.skipped:
            continue
        if block.file:
            write_file(block, place)
        elif block.language == "python":
            exec(compile(change(block.text), f"{name}:{block.line}", "exec"), names)
        elif block.language == "bash":
            run_block(block, psp, tiny)
    return names

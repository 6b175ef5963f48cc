"""The documents are correct: their code blocks and notebooks run, and the files and settings they name exist."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.integration.pages import (
    DOCS,
    ROOT,
    Block,
    blocks,
    commands,
    quick,
    run_block,
    run_page,
    shortened,
    write_file,
)  # fmt: skip

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


# --- docs/extending.md


@pytest.mark.parametrize("title", ["A loss", "An encoder", "A task", "A dataset", "A callback"])
def test_extending(title: str, psp, tiny: list[str], place: Path, own_modules) -> None:
    if title == "A dataset":
        pytest.importorskip("webdataset")
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    start = text.count("\n", 0, text.index(f"## {title}\n"))
    end = text.count("\n", 0, text.index("\n## ", text.index(f"## {title}\n") + 3))
    section = [block for block in blocks(DOCS / "extending.md") if start < block.line < end]
    for block in blocks(DOCS / "extending.md"):
        if block.language == "bash" and block.line < text.count("\n", 0, text.index("\n## ")):
            run_block(block, psp, tiny)  # used by all sections
    for block in section:
        if block.file:
            write_file(block, place)
            code = [line for line in block.text.splitlines() if line.strip()]
            assert len(code) <= 20, f"{block.file} has {len(code)} lines; the page promises at most 20"
    for block in section:
        if block.language == "bash":
            run_block(block, psp, tiny)
    if title in ("A loss", "A callback"):
        run = {"A loss": "edges", "A callback": "gradients"}[title]
        columns = (place / f"runs/inversion/{run}/csv/metrics.csv").read_text().splitlines()[0].split(",")
        promised = re.findall(r"`((?:train|val)/\w+)`", "\n".join(text.splitlines()[start:end]))
        lacking = set(promised) - set(columns)
        assert promised and not lacking, f"the page names {sorted(lacking)}, but the log only has {columns}"
    if title == "An encoder":
        assert {path.name for path in (place / "out").glob("*.png")} == {"0.png", "1.png"}
        from psp_lightning.models.registry import ENCODERS

        del ENCODERS["TinyEncoder"]
        sys.modules.pop("my_encoder")
        done = psp(
            "predict", "ckpt=runs/inversion/tiny", "input=faces/CelebA-HQ-img", "output=again", "accelerator=cpu"
        )
        assert done.code == 1 and "TinyEncoder" in done.err, done.err
        assert "my_encoder" not in sys.modules, "a checkpoint must not cause an import"
    if title == "A task":
        assert len(list((place / "coloured").glob("*.png"))) == 2


# --- docs/toyfaces.md


def test_toyfaces_page(psp, tiny: list[str], place: Path) -> None:
    for block in blocks(DOCS / "toyfaces.md"):
        if block.language == "python":
            exec(compile(block.text, f"toyfaces.md:{block.line}", "exec"), {"__name__": "toyfaces_page"})
        elif block.language == "bash":
            run_block(block, psp, tiny)
    sheet = place / "toyfaces.png"
    assert Image.open(sheet).size == Image.open(DOCS / "toyfaces.png").size
    assert (DOCS / "toyfaces.png").stat().st_size < 300_000
    assert len(list((place / "faces" / "CelebA-HQ-img").iterdir())) == 20


# --- docs/generator_training.md


def test_generator_training_page(psp, tiny: list[str], place: Path) -> None:
    page = DOCS / "generator_training.md"
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"generator_training.md:{block.line}", "exec"), {"__name__": "generator_page"})
        elif block.skipped:
            for name, *arguments in commands(block):
                done = psp(name.removeprefix("psp-").replace("-", "_"), *arguments, "--cfg", "job")
                assert done.code == 0, f"line {block.line}: {done.err}"
        else:
            run_block(block, psp, tiny)
    assert (place / "runs/generator/faces/generator.safetensors").is_file()


def test_generator_training_page_lists_the_channels_that_are_built() -> None:
    from psp_lightning.models.stylegan2 import Generator

    text = (DOCS / "generator_training.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d+) \| ([\d, ]+) \| (\d+) \|$", text, re.MULTILINE)
    assert [int(size) for size, _, _ in table] == [32, 64, 128, 256, 512, 1024]
    for size, listed, batch in table:
        base = 16384 if int(size) < 512 else 32768
        with torch.device("meta"):
            network = Generator(int(size), channel_multiplier=1, channel_base=base)
        widths = [network.input.input.shape[1], *(conv.conv.weight.shape[0] for conv in network.convs[1::2])]
        assert listed == ", ".join(map(str, widths)), size
        assert int(batch) == max(4, min(32, 4096 // int(size)))


# --- docs/latents_and_export.md


def test_latents_and_export_page(psp, tiny: list[str], place: Path) -> None:
    names: dict[str, object] = {"__name__": "latents_page"}
    for block in blocks(DOCS / "latents_and_export.md"):
        if block.language == "python":
            exec(compile(block.text, f"latents_and_export.md:{block.line}", "exec"), names)
        elif block.language == "bash":
            run_block(block, psp, tiny)
    first, again = (sorted((place / folder).glob("*.png")) for folder in ("out", "again"))
    assert [path.name for path in first] == [path.name for path in again] and len(first) == 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))
    assert names["image"].shape == (5, 3, 64, 64)  # type: ignore[attr-defined]


# --- README.md


def checkpoint(path: Path) -> Path:
    """Save a small network in the layout of the released pSp checkpoints."""
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=256, style_dim=512, n_mapping=8, channel_multiplier=2, max_channels=16)
    encoder = GradualStyleEncoder(generator.n_styles, 512)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in generator.state_dict().items()}
    options = {"encoder_type": "GradualStyleEncoder", "dataset_type": "ffhq_encode", "start_from_latent_avg": True}
    torch.save({"state_dict": state, "opts": options, "latent_avg": torch.zeros(512)}, path)
    return path


@pytest.mark.slow
def test_readme(psp, shell, tiny: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(place / "psp_ffhq_encode.pt")
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(ROOT / "README.md"):
        if block.file:
            (place / block.file).write_text(block.text)
            continue
        if block.skipped and "psp_ffhq_encode.pt" not in block.text:  # a stand-in exists for this file
            for name, *arguments in commands(block):
                done = psp(name.removeprefix("psp-"), *arguments, "--cfg", "job")
                assert done.code == 0, f"line {block.line}: {name} {' '.join(arguments)} --cfg job\n{done.err}"
            continue
        if block.language == "python":
            exec(compile(quick(block.text), f"README.md:{block.line}", "exec"), {"__name__": "readme"})
            continue
        if block.language != "bash":
            continue
        for name, *arguments in commands(block):
            if name == "make":
                assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), f"no make target {arguments[0]}"
            elif name.startswith("psp-"):
                text = " ".join(shlex.quote(part) for part in (name, *arguments))
                if any("devices=2" in item for item in arguments):  # spawning ranks does not work in pytest
                    done = shell("train", *shortened(arguments, tiny))
                    assert done.code == 0, f"line {block.line}: {text}\n{done.err}"
                    continue
                run_block(Block("bash", "", text, block.line, False), psp, tiny)
    assert len(list((place / "out").glob("*.png"))) == 2
    jobs = [path.parent.parent for path in (place / "runs" / "multirun").glob("*/*/checkpoints/last.ckpt")]
    assert sorted(path.name for path in jobs) == ["0", "0", "1", "1", "2", "3"], "a grid has four jobs, Optuna two"
    from psp_lightning.data.labels import load_label_map

    assert len(load_label_map(place / "my_labels.yaml")) == 3


def test_readme_is_short_and_names_what_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 230
    for group, name in re.findall(r"\b(task|domain|experiment|trainer|loss|encoder|debug)=(\w+)", text):
        if name.isupper():  # a placeholder
            continue
        assert (ROOT / "conf" / group / f"{name}.yaml").is_file(), f"README names {group}={name}"
    tasks = {path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")}
    assert tasks <= set(re.findall(r"`(\w+)`", text)), "a task is missing from the table"
    from psp_lightning.zoo.locate import RECORDS

    text += (DOCS / "weights.md").read_text(encoding="utf-8")
    for record in RECORDS.values():
        assert record.filename in text, f"neither README nor docs/weights.md tells where to put {record.filename}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_and_paths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for name in re.findall(r"`((?:conf|tests|docs|src|notebooks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for name in re.findall(r"`((?:models|losses|data|lit|cli|ops|optim|metrics|checkpoints|utils)/\w+\.py)", text):
        assert (ROOT / "src" / "psp_lightning" / name).exists(), f"{path.name} names {name}"


def test_architecture_page_lists_every_module_folder_and_dependency() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for folder in (ROOT / "src" / "psp_lightning").iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in text, f"docs/architecture.md does not describe {folder.name}/"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = tomllib.loads(project)["project"]
    extras = found["optional-dependencies"]
    for extra in extras:
        assert f"extra `{extra}`" in text, f"docs/architecture.md does not explain the extra {extra}"
    for requirement in [*found["dependencies"], *(item for items in extras.values() for item in items)]:
        name = re.split(r"[<>=!\[]", requirement)[0]
        assert name == "psp-lightning" or f"`{name}`" in text, f"docs/architecture.md gives no reason for {name}"


# --- docs/train_from_python.md


def test_train_from_python_page(psp, tiny: list[str], place: Path, own_modules) -> None:
    run_page("train_from_python.md", psp, tiny, place, quick)
    runs = {path.parent.parent.name for path in (place / "runs").glob("*/checkpoints/last.ckpt")}
    assert runs == {"first", "with_id", "no_images", "edges", "small", "photos"}
    assert len(list((place / "from_sketches").glob("*.png"))) == 4


# --- the notebooks

PICTURE = "image/"  # png or jpeg


def executed(name: str, place: Path, change: Callable[[str], str] = str) -> str:
    """Run a notebook in `place` and return it with its outputs, as text."""
    nbclient = importlib.import_module("nbclient")
    nbformat = importlib.import_module("nbformat")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = sum(PICTURE in str(output.get("data", {})) for cell in code for output in cell.outputs)
    assert shown >= 2, f"{name} is stored without its pictures"
    errors = [output for cell in code for output in cell.outputs if output.output_type in ("error", "stream")]
    assert not [e for e in errors if e.output_type == "error" or e.name == "stderr"], f"{name} is stored with errors"
    for cell in code:
        cell.source, cell.outputs = change(cell.source), []
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = [output.get("text", "") for output in outputs if output.get("name") != "stderr"]
    assert not any(str(place) in part for part in printed), "an output contains an absolute path"
    text = nbformat.writes(notebook)
    assert text.count(PICTURE) >= 2, "the executed notebook shows too few pictures"
    return text


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["own checkpoint", "shipped network"])
def test_notebook_predict_and_mix(given: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PSP_NOTEBOOK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if given:
        torch.save(small_network(), place / "network.ckpt")
        monkeypatch.setenv("PSP_NOTEBOOK", str(place))
    text = executed("predict_and_mix.ipynb", place)
    if given:
        assert "face_0" in text, "the given images were not used"


@pytest.mark.slow
def test_notebook_train(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = executed("train.ipynb", place, lambda source: quick(source).replace("steps = 200", "steps = 4"))
    assert "14 is the last step in the log" in text, "the run was not continued"
    assert (place / "runs/notebook/checkpoints/best.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["own photo and checkpoint", "shipped network"])
def test_notebook_photo(given: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("facenet_pytorch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("PSP_PHOTO", "PSP_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    if given:
        torch.save(small_network(), place / "network.ckpt")
        monkeypatch.setenv("PSP_PHOTO", "photos/face_1.jpg")
        monkeypatch.setenv("PSP_CHECKPOINT", "network.ckpt")
    text = executed("photo.ipynb", place)
    psnr = re.findall(r"PSNR of these: ([\d.]+) dB", text)
    assert len(psnr) == 1 and float(psnr[0]) > 40
    assert text.count(PICTURE) == 6 and len(text) < 600_000


def small_network() -> dict[str, object]:
    """Return the content of a checkpoint of psp-train."""
    from psp_lightning import PSP
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=64, style_dim=64, n_mapping=2, channel_multiplier=2, max_channels=16)
    encoder = GradualStyleEncoder(generator.n_styles, 64, input_size=64, blocks=(1, 1, 1, 1), width=8)
    net = PSP(encoder, generator, generator.latent_average(64), source={"kind": "rgb", "size": 64})
    return {"psp": net.describe(), "state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}


# --- docs/photos.md


def test_photos_page(psp, tiny: list[str], place: Path) -> None:
    pytest.importorskip("facenet_pytorch")
    run_page("photos.md", psp, tiny, place)
    for folder, names in (("faces", {"face_0.png", "face_1.png", "sheet.png"}), ("by_hand", {"face_0.png"})):
        assert {path.name for path in (place / folder).glob("*.png")} == names
    assert (place / "faces/face_1.png").read_bytes() == (place / "again/face_1.png").read_bytes()
    assert Image.open(place / "face.png").size == (256, 256)
    for name in ("out/pasted/face_0.png", "out/pasted/face_1.png", "pasted.png"):
        assert Image.open(place / name).size == (512, 512)

"""The pages show the stored measurements of the toy domain, and these were made with the shipped files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.toyfaces.evaluate import RESULTS, ROWS, mean_iou, table
from psp_lightning.models.face_parser import KINDS

ROOT = Path(__file__).parents[2]


def test_the_table_shows_the_measurements() -> None:
    measured = table(json.loads(RESULTS.read_text()))
    page = (ROOT / "docs" / "toyfaces.md").read_text(encoding="utf-8")
    assert measured in page, f"docs/toyfaces.md should contain this table:\n{measured}"


def test_the_readme_shows_the_inversion_figures() -> None:
    row = json.loads(RESULTS.read_text())["checkpoints"]["inversion"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = (
        f"`toyfaces/inversion` reaches a PSNR of {row['psnr']:.1f} dB and an identity similarity of "
        f"{row['id_similarity']:.2f}, at {row['ms_per_image']:.1f} ms per image"
    )
    assert sentence in text, f"README.md should contain: {sentence}"


def test_every_network_was_measured() -> None:
    results = json.loads(RESULTS.read_text())
    for part, names in ROWS.items():
        assert set(results[part]) == set(names), f"{part} of {RESULTS.name}"
    assert {row["images"] for part in ROWS for row in results[part].values()} == {1000}
    assert results["frechet"]["images"] == 10_000 and results["projection"]["images"] == 64


def test_the_numbers_come_from_the_shipped_files() -> None:
    records = json.loads((ROOT / "src/psp_lightning/weights/toyfaces/records.json").read_text())
    measured = json.loads(RESULTS.read_text())["sha256"]
    assert measured == {name: record["sha256"] for name, record in records.items()}


def test_mean_iou() -> None:
    labels = torch.arange(len(KINDS)).repeat(2)[:, None]
    assert mean_iou(labels, labels) == 1
    shifted = labels.clone()
    shifted[0] = 1  # background: one of two pixels is missed; skin: three are found, two of them are right
    expected = (1 / 2 + 2 / 3 + len(KINDS) - 2) / len(KINDS)
    assert mean_iou(shifted, labels) == pytest.approx(expected)

"""psp-predict takes photos, aligns the faces in them, and puts the results back."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data.spec import InputSpec, load_source, source_to_rgb
from psp_lightning.utils.images import to_pil
from tests.integration.test_align_command import crowd

pytest.importorskip("facenet_pytorch")
PLAIN = ["accelerator=cpu", "num_workers=0", "progress_bar=false", "align=true"]


def network(path: Path, **source: object) -> Path:
    """Save a small network with this source."""
    from psp_lightning import PSP
    from psp_lightning.checkpoints.weight_files import save_psp
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator

    spec = InputSpec(**{"kind": "rgb", "size": 64, **source})  # type: ignore[arg-type]
    torch.manual_seed(0)
    generator = Generator.seeded(0, output_size=64, style_dim=64, n_mapping=2, channel_multiplier=2, max_channels=16)
    encoder = GradualStyleEncoder(
        generator.n_styles, 64, in_channels=spec.channels, input_size=64, blocks=(1, 1, 1, 1), width=8
    )
    save_psp(path, PSP(encoder, generator, generator.latent_average(64), source=spec.to_dict()))
    return path


def test_faces_are_translated_and_put_back(psp, photos, tmp_path):
    (tmp_path / "in" / "more").mkdir(parents=True)
    shutil.copy(photos / "face_0.jpg", tmp_path / "in")
    shutil.copy(photos / "input_mask.png", tmp_path / "in")
    crowd(photos, 2, 300).save(tmp_path / "in" / "more" / "four.png")
    common = [*PLAIN, "ckpt=toyfaces/inversion", "input=in", "output=out", "faces=all", "paste_back=true", "sheet=true"]
    done = psp("predict", *common)
    assert done.code == 1 and "error: input_mask.png: no face was found" in done.err, done.err
    assert "5 written, 0 skipped, 0 failed" in done.out and "pasted: 2 written, 0 skipped, 0 failed" in done.out
    with (tmp_path / "out/aligned/faces.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    assert {row["file"] for row in rows} == {"face_0_0.png", *(f"more/four_{k}.png" for k in range(4))}
    for row in rows:
        assert Image.open(tmp_path / "out" / row["file"]).size == (64, 64)
    before, after = (
        np.asarray(Image.open(tmp_path / name), int) for name in ("in/more/four.png", "out/pasted/more/four.png")
    )
    changed = abs(before - after).max(-1) > 20
    for row in (row for row in rows if row["photo"] == "more/four.png"):
        x, y = (
            round(np.mean([float(row[f"{corner}_{axis}"]) for corner in ("upper_left", "lower_right")]))
            for axis in "xy"
        )
        output = np.asarray(Image.open(tmp_path / "out" / row["file"]), int)[30:34, 30:34].mean((0, 1))
        assert abs(after[y - 10 : y + 10, x - 10 : x + 10].mean((0, 1)) - output).max() < 12, (
            "not the output of this face"
        )
    assert changed.any() and not changed[:, :3].any()

    again = psp("predict", *common)
    assert "0 written, 5 skipped" in again.out and "pasted: 0 written, 2 skipped" in again.out and again.code == 1
    other = psp("predict", *common, "paste.match_colour=true")
    assert "0 written, 5 skipped" in other.out and "pasted: 2 written, 0 skipped" in other.out
    region = psp("predict", *common, "paste.parser=toyfaces/parser")
    assert "pasted: 2 written, 0 skipped" in region.out, region.err
    wrong = psp("predict", *common, "paste.parser=toyfaces/identity")
    assert "not a face parser" in wrong.err and wrong.code == 1
    lines = [json.loads(line) for line in (tmp_path / "out/pasted/manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "ok"]

    (tmp_path / "out/pasted/manifest.jsonl").unlink()
    refused = psp("predict", *common)
    assert refused.code == 1 and "has no record in manifest.jsonl" in refused.err
    assert psp("predict", *common, "overwrite=true").code == 1


def test_several_outputs_for_each_face(psp, photos, tmp_path):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    done = psp(
        "predict", *PLAIN, "ckpt=toyfaces/inversion", "input=face_0.jpg", "output=out", "paste_back=true",
        "mix.latent_mask=[4,5,6]", "mix.n_outputs=2", "format=jpg",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out/pasted").glob("*.jpg")} == {"face_0_0.jpg", "face_0_1.jpg"}


@pytest.mark.parametrize(
    "settings",
    [
        ["ckpt=toyfaces/inversion_refined"],
        ["ckpt=toyfaces/inversion", "refine=optimize", "refine.steps=2", "refine.space=features"],
        ["ckpt=toyfaces/inversion", "refine=optimize", "refine.steps=2", "refine.space=weights"],
    ],
    ids=["refiner", "features", "weights"],
)
def test_refined_faces_are_put_back(psp, photos, tmp_path, settings):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    images = {}
    for output, own in (("refined", settings), ("codes", ["ckpt=toyfaces/inversion", "refine=none"])):
        done = psp("predict", *PLAIN, *own, "input=face_0.jpg", f"output={output}", "paste_back=true", "latents=true")
        assert done.code == 0 and "pasted: 1 written" in done.out, done.err
        images[output] = [
            np.asarray(Image.open(tmp_path / output / name), int) for name in ("face_0.png", "pasted/face_0.png")
        ]
    (refined, pasted), (plain, plainly_pasted) = images["refined"], images["codes"]
    assert (abs(refined - plain) > 2).any() and (abs(pasted - plainly_pasted) > 2).any()
    middle = pasted[240:260, 250:270].mean((0, 1))  # of the face, and of the output
    assert abs(middle - refined[30:34, 30:34].mean((0, 1))).max() < 12, "not the refined output"
    assert (tmp_path / "refined" / "refinements" / "face_0.safetensors").is_file()
    assert not (tmp_path / "codes" / "refinements").exists()


def test_landmarks_instead_of_the_detector(psp, photos, tmp_path):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    points = [[197, 231], [320, 243], [200, 364], [325, 377]]
    (tmp_path / "my points.json").write_text(json.dumps({"face_0": points}))
    done = psp(
        "predict", *PLAIN, "ckpt=toyfaces/inversion", "input=face_0.jpg", "output=out", "landmarks=my points.json"
    )
    assert done.code == 0 and "photos: 1 face; out/aligned/faces.csv" in done.out, done.err


def test_no_photo_has_a_face(psp, photos, tmp_path):
    shutil.copy(photos / "input_mask.png", tmp_path)
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    done = psp(
        "predict", *PLAIN, "ckpt=toyfaces/inversion", "input=*.png", "output=out", "paste_back=true", "sheet=true",
        "latents=true",
    )  # fmt: skip
    assert done.code == 1 and "Traceback" not in done.err
    for name in ("input_mask.png", "pixel.png"):
        assert f"error: {name}: no face was found" in done.err
    assert "0 written, 0 skipped" in done.out and "photos: 0 faces, 2 photos without a face" in done.out, done.out


@pytest.mark.parametrize(
    ("source", "settings", "given"),
    [
        ({"kind": "lowres", "factors": (1, 4)}, ["factor=4"], {"factor": 4}),
        ({"kind": "lowres", "factors": (1, 4)}, [], {}),
        ({"kind": "masked"}, ["mask.kind=box", "mask.composite=true"], {"rng": [0, 0]}),
        ({"kind": "masked"}, ["mask.dir=masks"], {"mask": "masks/face_0.png"}),
        ({}, [], {}),  # toonify
        ({"task": "frontalization"}, [], {}),
    ],
    ids=["superres", "superres of small photos", "inpainting", "inpainting with a mask", "toonify", "frontalization"],
)
def test_the_source_of_each_task_is_made_from_the_aligned_face(psp, photos, tmp_path, source, settings, given):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    network(tmp_path / "net.safetensors", **source)
    (tmp_path / "masks").mkdir()
    Image.linear_gradient("L").save(tmp_path / "masks" / "face_0.png")
    fits = source.get("task") is None
    done = psp(
        "predict", *PLAIN, "ckpt=net.safetensors", "input=face_0.jpg", "output=out", "side_by_side=true",
        f"paste_back={str(fits).lower()}", *settings,
    )  # fmt: skip
    assert done.code == 0, done.err
    spec = InputSpec(**{"kind": "rgb", "size": 64, **source})
    if "rng" in given:
        spec, given = replace(spec, mask={"kind": "box"}), {"rng": np.random.default_rng(given["rng"])}
    expected = source_to_rgb(load_source(tmp_path / "out/aligned/face_0.png", spec, **given)[None], spec)[0]
    pair = Image.open(tmp_path / "out/side_by_side/face_0.png")
    assert np.array_equal(np.asarray(pair)[:, :64], np.asarray(to_pil(expected))), "the source is another picture"
    assert (tmp_path / "out/face_0.png").is_file() and (tmp_path / "out/pasted/face_0.png").is_file() == fits


@pytest.mark.slow
def test_two_devices_give_the_same_files(shell, photos, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("face_0.jpg", "face_1.jpg", "input_mask.png"):
        shutil.copy(photos / name, tmp_path / "in")
    crowd(photos, 2, 300).save(tmp_path / "in" / "four.png")
    files = []
    for n in (1, 2):
        done = shell(
            "predict", *PLAIN, "ckpt=toyfaces/inversion", "input=in", f"output=out{n}", "faces=all", "paste_back=true",
            "sheet=true", "batch_size=1", f"devices={n}",
        )  # fmt: skip
        assert done.code == 1 and "6 written" in done.out and "pasted: 3 written" in done.out, done.err
        found = sorted(path for path in (tmp_path / f"out{n}").rglob("*") if path.suffix in (".png", ".csv"))
        files.append({path.relative_to(tmp_path / f"out{n}").as_posix(): path.read_bytes() for path in found})
    assert list(files[0]) == list(files[1]) and len(files[0]) == 6 + 6 + 3 + 2
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


def test_networks_that_do_not_fit(psp, photos, tmp_path):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    network(tmp_path / "frontal.safetensors", task="frontalization")
    common = [*PLAIN, "input=face_0.jpg", "output=out"]
    done = psp("predict", *common, "ckpt=frontal.safetensors", "paste_back=true")
    assert done.code == 1 and "frontalization turns the face" in done.err and not (tmp_path / "out").exists()
    assert psp("predict", *common, "ckpt=frontal.safetensors").code == 0
    done = psp("predict", *common, "ckpt=toyfaces/sketch2face")
    assert done.code == 1 and "takes sketch images" in done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align=maybe"], "align=maybe must be true or false"),
        (["paste_back=true"], "paste_back=true needs align=true"),
        (["landmarks=a.csv"], "needs align=true"),
        (["align=true", "faces=bigest"], "Did you mean 'largest'"),
        (["align=true", "paste.feather=2"], "paste.feather=2 must be a number, from 0 to 0.5"),
        (["align=true", "input=none"], "input=none does not exist"),
    ],
)
def test_mistakes(psp, photos, tmp_path, settings, message):
    shutil.copy(photos / "face_0.jpg", tmp_path)
    done = psp("predict", "ckpt=toyfaces/inversion", "input=face_0.jpg", "output=out", "accelerator=cpu", *settings)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err

"""The comparison script at tiny sizes, without the reference implementation and with a stand-in for it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compare import __main__ as command
from benchmarks.compare import reference, report
from benchmarks.compare.floor import Layers, bandwidth, floor, matrix_rate
from benchmarks.compare.kernels import measure_kernels, sizes
from benchmarks.compare.rows import (
    BFLOAT16,
    FLOAT32,
    QUICK,
    REFERENCE,
    Aim,
    Job,
    Row,
    Scale,
    rows,
    scale_for,
)
from benchmarks.compare.worker import WorkerError, work
from psp_lightning import PSP

# A clone with the reference's interface around this library's network. It tests the script: paths, turns, agreement.
STAND_IN = {
    "options/train_options.py": """
from argparse import ArgumentParser
class TrainOptions:
    def __init__(self):
        self.parser = ArgumentParser()
        self.parser.add_argument("--output_size", type=int)
        self.parser.add_argument("--start_from_latent_avg", action="store_true")
        for name in ("lpips_lambda", "l2_lambda", "id_lambda", "w_norm_lambda"):
            self.parser.add_argument("--" + name, type=float)
        self.parser.add_argument("--checkpoint_path")
""",
    "models/psp.py": """
from torch import nn
from models.stylegan2.op import upfirdn2d
from psp_lightning import PSP
class pSp(nn.Module):
    def __init__(self, opts):
        super().__init__()
        self.opts = opts
        self.net = PSP.from_checkpoint(opts.checkpoint_path)
        self.encoder, self.latent_avg = self.net.encoder, self.net.latent_avg.clone()
    def decoder(self, codes, input_is_latent, randomize_noise):
        assert input_is_latent and not randomize_noise
        return self.net.decode(codes[0]) + ERROR, None
""",
    "models/stylegan2/model.py": "",
    "models/stylegan2/op/__init__.py": "from .upfirdn2d import upfirdn2d\n",
    "models/stylegan2/op/upfirdn2d.py": """
from torch.utils.cpp_extension import load
upfirdn2d_op = load("upfirdn2d", sources=["upfirdn2d.cpp"])
def upfirdn2d_native(*args): return F.relu(args[0])
def upfirdn2d(*args): return upfirdn2d_op.upfirdn2d(*args)
""",
    "training/coach.py": "",
}


def stand_in(folder: Path, error: float = 0) -> Path:
    for name, text in STAND_IN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("ERROR", str(error)))
    return folder


def serve(job: Job, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a worker in this process and return its answers."""
    answers: list[dict[str, Any]] = []
    work(job, answers.append, io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    return answers


# --- rows and report


def test_rows_have_distinct_names_and_the_aims_of_the_full_size():
    for device in ("cpu", "cuda"):
        for scale in (scale_for(device, quick=False, files=None), QUICK):
            found = rows(scale, device)
            assert len({row.name for row in found}) == len(found)
            assert any(row.aims for row in found) == scale.full, "aims apply to the full sizes only"
    by_name = {row.name: row for row in rows(Scale(), "cpu")}
    assert by_name["train-1024"].aims == {
        FLOAT32: Aim(faster=5, memory=0.6),
        BFLOAT16: Aim(faster=8, memory=0.6),
    }
    assert by_name["generator-1024"].aims[BFLOAT16] == Aim(faster=9)


def test_only_takes_name_prefixes_and_lists_the_rows():
    found = command.chosen(rows(Scale(), "cpu"), ["train", "encoder"])
    assert [row.name for row in found] == ["encoder", "train-256", "train-1024"]
    with pytest.raises(SystemExit, match="--only training: no such row.*generator-1024"):
        command.chosen(rows(Scale(), "cpu"), ["training"])


def test_spread_and_ratios():
    sides: dict[str, Any] = {
        REFERENCE: {"seconds": [4.0, 8.0, 6.0], **report.spread([4.0, 8.0, 6.0]), "peak": 200},
        FLOAT32: {
            "seconds": [2.0, 2.0, 1.0],
            "beside": [4.0, 8.0, 6.0],
            **report.spread([2.0, 2.0, 1.0]),
            "peak": 50,
        },
        BFLOAT16: {"not_measured": "not measured: why"},
    }
    report.ratios(sides)
    assert sides[REFERENCE]["median"] == 6 and sides[REFERENCE]["quartiles"] == [5, 7]
    assert sides[FLOAT32]["faster"] == 3 and sides[FLOAT32]["memory"] == 0.25
    assert (sides[FLOAT32]["faster_spread"]["least"], sides[FLOAT32]["faster_spread"]["most"]) == (2, 6)
    assert "faster" not in sides[BFLOAT16] and "faster" not in sides[REFERENCE]


def test_table_has_aims_beside_ratios_and_marks_unmeasured_rows():
    row = Row("r", "a row", "image", 32, aims={FLOAT32: Aim(faster=2, memory=0.5), BFLOAT16: Aim(faster=4, floor=2)})
    sides: dict[str, Any] = {
        REFERENCE: {"seconds": [4.0], **report.spread([4.0]), "peak": 100 << 20},
        FLOAT32: {"seconds": [1.0], "beside": [4.0], **report.spread([1.0]), "peak": 60 << 20},
        BFLOAT16: {"not_measured": "not measured: the processor has no bfloat16"},
    }
    report.ratios(sides)
    rows = [row, Row("s", "another", "image", 32), Row("t", "broken", "image", 32)]
    lines = report.table({"r": {"sides": sides}, "t": {"sides": {}, "failed": "why"}}, rows).splitlines()
    assert len(lines) == 2 + 3 + 1 + 1 and lines[6].startswith("| broken |") and "failed" in lines[6]
    assert ">= 2x: met; <= 50% memory: missed" in lines[3] and "4.00x" in lines[3] and "60 MiB (60%)" in lines[3]
    assert "no bfloat16" in lines[4] and ">= 4x: not measured; <= 2x floor: not measured" in lines[4]
    assert lines[5].startswith("| another |") and "not measured" in lines[5]
    assert {line.count("|") for line in lines} == {9}


def test_kept_rows_keep_the_title_they_were_measured_under():
    row = next(row for row in rows(Scale(), "cpu") if row.name == "predict")
    assert "16 files" in row.title
    lines = report.table(
        {"predict": {"title": "psp-predict, 200 files", "sides": {FLOAT32: {"not_measured": "x"}}}}, [row]
    )
    assert "| psp-predict, 200 files | float32 |" in lines and "16 files" not in lines


def test_kernel_table():
    kernels = [
        {"name": "k", "dtype": "float32", "seconds": 1e-3, "of_copy": 0.9, "faster": share} for share in (1, 0.9)
    ]
    lines = report.kernel_table(kernels).splitlines()
    assert "90%" in lines[2] and lines[2].endswith("| met |") and lines[3].endswith("| missed |")


def test_details_accept_rows_without_sides():
    assert report.details({"kernels": {"title": "kernels", "kernels": []}}) == ""


def test_report_without_a_gpu_lists_its_rows_as_not_measured(tmp_path: Path):
    absent = [row for row in rows(Scale(train_batch=8, files=200), "cuda") if row.aims or row.kind == "kernels"]
    results = {"date": "2000-01-01", "machine": {"processor": "P", "cores": 2}, "rows": {}}
    text = report.markdown(results, [], absent)
    assert "Measured 2000-01-01: processor P, cores 2." in text
    assert ">= 8x: not measured; <= 2x floor: not measured" in text and "<= 0.003 s: not measured" in text
    assert ">= 85% of the copy bandwidth; >= 1x plain PyTorch: not measured" in text
    paths = report.save(tmp_path / "new", "compare_cpu", results, text)
    assert json.loads(paths[0].read_text()) == results and paths[1].read_text() == text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["compare_cpu.json", "compare_cpu.md"]


# --- our side


@pytest.mark.parametrize("kind", ["generator", "encoder", "image", "train"])
def test_our_side_of_every_kind(kind: str, weights: dict[str, str], overrides: list[str], tmp_path: Path):
    found = {}
    for side in (FLOAT32, BFLOAT16):
        path = tmp_path / side
        ready, checked, ran = serve(
            Job(kind, 32, 2, side, "cpu", weights, overrides),
            {"do": "check", "seed": 1, "path": str(path)},
            {"do": "run", "seed": 2},
        )
        assert ready["seconds"] > 0 and checked == {} and ran["seconds"] > 0 and ran["peak"] > 0
        found[side] = torch.load(path)
    if kind == "train":
        assert set(found[FLOAT32]) == {"l2", "lpips", "id", "w_norm", "loss", "gradient"}
        torch.testing.assert_close(found[BFLOAT16]["loss"], found[FLOAT32]["loss"], rtol=0.05, atol=0)
        return
    expected = found[FLOAT32]["output"]
    assert expected.shape == ((2, 8, 32) if kind == "encoder" else (2, 3, 32, 32))
    difference = (found[BFLOAT16]["output"] - expected).abs().mean() / expected.std()
    assert 0 < difference < 0.05


def test_parts_of_a_prediction(weights: dict[str, str], photos: Path):
    job = Job("predict", 32, 1, FLOAT32, "cpu", {**weights, "images": str(photos)}, [])
    _, answer = serve(job, {"do": "run", "seed": 0})
    assert set(answer["result"]) == {"reading", "network", "writing"} and min(answer["result"].values()) > 0


@pytest.mark.slow
def test_script_without_the_reference(weights: dict[str, str], tmp_path: Path):
    comparison = command.Comparison("cpu", None, Path(weights["psp"]).parent, rounds=1)
    (Path(weights["psp"]).parent / "psp_32.safetensors").symlink_to(weights["psp"])  # the small network's file
    comparison.bfloat16 = False
    found = command.measure(comparison, Row("image", "image to image", "image", 32, 2))
    assert found["sides"][FLOAT32]["runs"] == 1 and found["sides"][FLOAT32]["floor"] > 0
    assert "no bfloat16" in found["sides"][BFLOAT16]["not_measured"]


@pytest.mark.slow
def test_a_change_is_measured_against_an_earlier_checkout(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Compare this checkout with itself: nothing differs, and the ratio is a number."""
    assert command.main(["--before", str(command.ROOT), "--quick", "--only", "generator-32", "--rounds", "1"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| generator-32 | float32"))
    cells = [cell.strip() for cell in row.split("|")]
    assert float(cells[5].split()[0]) > 0 and cells[7] == "0.0e+00", row
    with pytest.raises(SystemExit, match="is not a checkout of this repository"):
        command.main(["--before", str(tmp_path), "--only", "encoder"])
    with pytest.raises(SystemExit, match="--before can only be combined with"):
        command.main(["--before", str(command.ROOT), "--out", str(tmp_path)])


# --- the reference's side


def test_update_replaces_rows_and_records_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "compare_cpu.json"
    machine = {"cores": 2}
    old = {
        "date": "then",
        "commit": "a",
        "machine": machine,
        "reference_commit": "r",
        "rows": {"x": {"title": "X"}, "y": {"title": "Y"}},
    }
    new = {
        "date": "now",
        "commit": "b",
        "machine": machine,
        "reference_commit": "r",
        "rows": {"y": {"title": "Y", "sides": {}}},
    }
    with pytest.raises(SystemExit, match="no compare_cpu.json yet"):
        report.to_update(path, new)
    path.write_text(json.dumps(old))
    found = report.updated(report.to_update(path, new), new)
    assert found["date"] == "then" and list(found["rows"]) == ["x", "y"] and found["rows"]["x"] == {"title": "X"}
    assert "- Y: measured now at commit b" in report.details(found["rows"])
    failed = {**new, "rows": {"x": {"title": "X", "sides": {}, "failed": "killed"}}}
    assert report.updated(old, failed)["rows"] == old["rows"], "a failed row must not replace the old one"
    for key, message in (("machine", "another machine"), ("reference_commit", "another reference")):
        with pytest.raises(SystemExit, match=message):
            report.to_update(path, {**new, key: "x"})
    both, out = ["--only", "encoder", "--reference", str(tmp_path)], ["--out", str(tmp_path)]
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(reference, "missing", lambda clone: [])
    for wrong in ([], both[:2], both[2:], [*both, "--quick"], [*both, *out]):
        wrong = ["--update", *wrong]
        with pytest.raises(SystemExit, match="--update needs --only and --reference"):
            command.main(wrong)


def test_a_folder_that_is_not_a_clone_is_rejected(tmp_path: Path):
    assert reference.missing(tmp_path)[0] == "models/psp.py"
    assert reference.missing(stand_in(tmp_path)) == []
    with pytest.raises(SystemExit, match="is not a clone of eladrich/pixel2style2pixel: models/psp.py is missing"):
        command.main(["--reference", str(tmp_path / "models")])


@pytest.mark.slow
@pytest.mark.parametrize(("error", "message"), [(0.0, None), (0.5, "float32 differs from reference in output")])
def test_stand_in_takes_turns_and_must_agree(
    error: float, message: str | None, weights: dict[str, str], tmp_path: Path
):
    comparison = command.Comparison("cpu", stand_in(tmp_path, error), Path(weights["psp"]).parent, rounds=2)
    comparison.bfloat16 = False
    row = Row("generator", "generator", "generator", 32, apart=error == 0)
    if message is not None:
        with pytest.raises(WorkerError, match=message):
            command.measure(comparison, row)
        return
    found = command.measure(comparison, row)
    assert found["agreement"][FLOAT32]["output"] < 1e-4
    assert found["sides"][REFERENCE]["runs"] == found["sides"][FLOAT32]["runs"] == 2
    assert (
        len(found["sides"][FLOAT32]["beside"]) == 2
        and found["sides"][FLOAT32]["faster"] > 0
        and found["sides"][FLOAT32]["memory"] > 0
    )


@pytest.mark.slow
def test_training_measures_the_second_step_of_each_turn(tmp_path: Path):
    asked: list[str] = []

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, do: str, **_: object) -> dict[str, float]:
            if do == "floor":
                return {}
            asked.append(self.name)
            return {"seconds": float(len(asked)), "peak": 1.0}

    row = next(row for row in rows(QUICK, "cpu") if row.name.startswith("train"))
    sides: dict[str, Any] = {}
    comparison = command.Comparison("cpu", None, tmp_path, rounds=2)
    comparison.take_turns(row, {REFERENCE: Side(REFERENCE), FLOAT32: Side(FLOAT32)}, sides)  # type: ignore[dict-item]
    assert asked == [REFERENCE] * 2 + [FLOAT32] * 4 + [REFERENCE] * 2
    assert sides[REFERENCE]["seconds"] == [2, 8] and sides[FLOAT32]["seconds"] == [4, 6]


def test_ours_is_measured_if_the_reference_runs_out_of_memory(weights: dict[str, str], tmp_path: Path):
    clone = stand_in(tmp_path, 0.0)
    network = clone / "models" / "psp.py"
    network.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n" + network.read_text())
    comparison = command.Comparison("cpu", clone, Path(weights["psp"]).parent, rounds=1)
    found = command.measure(comparison, Row("generator", "generator", "generator", 32, sides=(FLOAT32,)))
    assert found["sides"][REFERENCE] == {"not_measured": "out of memory"}
    assert found["sides"][FLOAT32]["runs"] == 1 and "faster" not in found["sides"][FLOAT32]
    table = report.table({"generator": found}, [Row("generator", "generator", "generator", 32)])
    assert "| reference | out of memory |" in table


def test_compiled_operations_are_replaced_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    before = dict(sys.modules)
    try:
        assert len(reference.enter(stand_in(tmp_path), "cpu")) == 1
        module: ModuleType = sys.modules["models.stylegan2.op.upfirdn2d"]
        assert module.upfirdn2d(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] == "models":
                del sys.modules[name]


def test_fused_bias_act_is_leaky_relu_and_its_derivative():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    bias, none = torch.randn(3, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    y = reference.fused_bias_act(x, bias, none, 3, 0, 0.2, 2**0.5)
    torch.testing.assert_close(y, F.leaky_relu(x + bias.view(1, 3, 1, 1), 0.2) * 2**0.5)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(reference.fused_bias_act(dy, none, y, 3, 1, 0.2, 2**0.5), expected)


# --- the floor and the kernels


def test_layers_are_counted_but_not_single_channel_filters():
    x, w = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    with Layers() as layers:
        y = F.conv2d(x, w, padding=1)
        F.conv2d(x, torch.randn(4, 1, 3, 3), groups=4)
        F.conv_transpose2d(y, w, stride=2)
        F.linear(torch.randn(5, 7), torch.randn(3, 7))
    first, second, third = layers.found
    assert first == (2 * 2 * 6 * 64 * 4 * 9, x.numel() + w.numel() + y.numel())
    assert second[0] == 2 * y.numel() * 4 * 9
    assert third == (2 * 5 * 7 * 3, 35 + 21 + 15)


def test_floor_is_proportional_to_the_batch(weights: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    import benchmarks.compare.floor as module

    monkeypatch.setattr(module, "matrix_rate", lambda *args: 1e9)
    monkeypatch.setattr(module, "bandwidth", lambda *args: 1e30)
    net = PSP.from_checkpoint(weights["psp"])
    one, four = (floor(net.describe(), Job("image", 32, n, FLOAT32, "cpu", weights)) for n in (1, 4))
    assert one["operations"] > 1e6
    assert one["floor_seconds"] == pytest.approx(one["operations"] / 1e9)
    assert four["floor_seconds"] == pytest.approx(4 * one["floor_seconds"])


def test_rates_are_measured():
    assert matrix_rate("cpu", torch.float32, 64) > 1e6 and bandwidth("cpu", 1 << 16) > 1e6


def test_a_failing_product_leaves_the_precision_of_products(monkeypatch: pytest.MonkeyPatch):
    import benchmarks.compare.floor as module

    def fail(run: object, device: str) -> float:
        assert torch.backends.cuda.matmul.allow_tf32
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "best", fail)
    assert torch.backends.cudnn.allow_tf32  # the default
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(RuntimeError, match="out of memory"):
        matrix_rate("cpu", torch.float32, 8)
    assert not before and not torch.backends.cuda.matmul.allow_tf32


def test_on_a_gpu_the_device_measures_its_own_time(monkeypatch: pytest.MonkeyPatch):
    """Events around calls that wait behind a busy queue; the time of the host does not count."""
    import benchmarks.compare.floor as module

    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 20.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("sleep"))
    assert module.best(lambda: queue.append("call"), "cuda", times=2) == pytest.approx(0.02 / module.CALLS)
    assert queue == ["wait", "sleep", "event", *["call"] * module.CALLS, "event", "wait"] * 3


def test_kernels_run_against_plain_pytorch():
    assert sizes(1024) == [(128, 256), (64, 512), (32, 1024)]
    found = measure_kernels(Job("kernels", 8, 1, FLOAT32, "cpu", {}))["kernels"]
    names = {kernel["name"].split()[0] for kernel in found}
    assert names == {"bias_act", "modconv_epilogue", "upfirdn2d"} and len(found) == 2 * 3 * 4
    assert all(kernel["seconds"] > 0 and kernel["of_copy"] > 0 for kernel in found)


def test_the_row_of_the_fused_filter_measures_the_fused_filter(fake_kernels: Any):
    measure_kernels(Job("kernels", 8, 1, FLOAT32, "cpu", {}))
    with_filter = [x for x, fy in fake_kernels.epilogues if fy is not None]
    grown = {(channels, side + 1) for channels, side in sizes(8)}
    assert {(x.shape[1], x.shape[2]) for x in with_filter} == grown
    assert not [x for x, fy in fake_kernels.epilogues if fy is None and (x.shape[1], x.shape[2]) in grown]


# --- the page


def test_page_shows_the_stored_results():
    page = (command.PAGE).read_text(encoding="utf-8")
    shown = page.split(report.BEGIN)[1].split(report.END)[0].strip()
    kept = "\n".join(path.read_text(encoding="utf-8") for path in sorted(command.RESULTS.glob("compare_*.md")))
    assert shown == (kept.strip() or "Not measured yet.")


def test_page_names_the_rows():
    page = command.PAGE.read_text(encoding="utf-8")
    for row in rows(Scale(), "cuda"):
        assert f"`{row.name}`" in page or f"`-{row.name.rsplit('-', 1)[-1]}`" in page, row.name


def test_results_are_inserted_between_the_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.refresh(page, "new\n")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"

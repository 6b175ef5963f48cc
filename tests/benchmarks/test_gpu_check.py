"""The check for a machine with a GPU: its control flow, and its measurements at tiny sizes, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    assert gpu_check.main([str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [False, True])
def test_all_steps_run_and_are_reported(bad, monkeypatch, capsys, tmp_path):
    failing = [
        Step("build", python("print('a.cu(7): error'); raise SystemExit(3)"), 60, "built"),
        Step("hangs", python("import time; print('begun', flush=True); time.sleep(60)"), 3, "nothing"),
    ]
    plan = [
        *(failing if bad else []),
        Step("profile", ["no-such-profiler"], 60, "bytes", ("no-such-profiler",)),
        Step("last one", python("import os; print(os.environ['A'], 'done')"), 60, "done", env={"A": "all"}),
    ]
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "steps", lambda: plan)
    assert gpu_check.main([str(tmp_path)]) == (1 if bad else 0)
    said, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    words = ["profile: left out: no-such-profiler is missing", "last one: passed"]
    words += ["build: failed (status 3)", "hangs: stopped after 3 s"] if bad else []
    for line in words:
        assert line in said and line in report
    assert "all done" in report and ("a.cu(7): error" in report and "begun" in report) == bad
    assert "all done" in (tmp_path / f"{len(plan) - 1}_last_one.txt").read_text()


def test_the_steps_name_what_exists():
    root = Path(gpu_check.__file__).parents[1]
    names = [step.name for step in gpu_check.steps()]
    assert names[:3] == ["machine", "build", "agreement"] and len(set(names)) == len(names)
    for step in gpu_check.steps():
        for word in step.command:
            if word.startswith(("tests/", "benchmarks/")):
                assert (root / word).exists(), word
            if word.startswith(("psp_lightning.", "benchmarks.")):
                assert (root / (word.replace(".", "/") + ".py")).exists() or (
                    root / "src" / (word.replace(".", "/") + ".py")
                ).exists(), word


def test_the_measurements_run_on_a_cpu(capsys):
    gpu_check.kernels("cpu", 8)
    assert "modconv_epilogue with filter 8x" in capsys.readouterr().out
    gpu_check.graph("cpu", 16, 8, 8, input_size=32, blocks=(1, 1, 1, 1), width=4)
    assert "batch 8: difference 0.0e+00" in capsys.readouterr().out
    gpu_check.inversion("cpu", 32, 2, 8, input_size=32, blocks=(1, 1, 1, 1), width=4)
    printed = capsys.readouterr().out
    assert "encoder and refiner, batch 8, torch.bfloat16: eager" in printed
    assert "optimisation of weights" in printed

"""psp-doctor: its report without a GPU, its settings, its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psp_lightning.cli import doctor
from psp_lightning.ops.check import Result
from psp_lightning.ops.cuda import build as _jit
from psp_lightning.ops.cuda import toolchain as _toolchain


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PSP_OPS_DIR", str(tmp_path / "ops"))
    for name in ("PSP_OPS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


def lines(output: str) -> dict[str, str]:
    return {line[:15].strip(): line[16:] for line in output.splitlines()}


def test_without_a_gpu(capsys):
    assert doctor.report()
    shown = lines(capsys.readouterr().out)
    assert shown["PSP_OPS"] == "auto (not set)" and torch.__version__ in shown["torch"]
    assert shown["in use"] == "plain PyTorch: there is no GPU" and shown["architectures"] == "none"
    assert {"CUDA toolkit", "ninja", "C++ compiler", "kernels in", "built", "GPU"} <= set(shown)


@pytest.mark.parametrize("choice, good, why", [("cuda", False, "no GPU"), ("ref", True, "PSP_OPS=ref is set")])
def test_choice(monkeypatch, capsys, choice, good, why):
    monkeypatch.setenv("PSP_OPS", choice)
    assert doctor.report() is good
    shown = lines(capsys.readouterr().out)
    assert shown["PSP_OPS"] == choice and why in shown["in use"]


def test_build(monkeypatch, capsys):
    monkeypatch.setattr(_toolchain, "missing", lambda: "")
    assert not doctor.report(build=True)  # no GPU to build for
    assert "TORCH_CUDA_ARCH_LIST" in lines(capsys.readouterr().out)["built"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    make = "import sys; open(sys.argv[1] + '/psp_lightning_ops.so', 'w').write('x')"
    monkeypatch.setattr(_jit, "build_command", lambda scratch: [sys.executable, "-c", make, str(scratch)])
    assert doctor.report(build=True)
    assert lines(capsys.readouterr().out)["built"] == "yes"
    assert doctor.report()
    shown = lines(capsys.readouterr().out)
    assert shown["built"] == "yes" and shown["architectures"] == "8.0 9.0"


def test_a_failed_build(monkeypatch, capsys):
    monkeypatch.setattr(_toolchain, "missing", lambda: "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    fail = "print('kernel.cu(7): error'); raise SystemExit(3)"
    monkeypatch.setattr(_jit, "build_command", lambda scratch: [sys.executable, "-c", fail])
    assert not doctor.report(build=True)
    assert "kernel.cu(7): error" in capsys.readouterr().out


def test_results_of_the_check(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    results = [Result("a", 1e-7, 2e-6), Result("b", float("nan"), 2e-6)]
    monkeypatch.setattr("psp_lightning.ops.check.run_checks", lambda device: iter(results))
    assert not doctor._check()
    out = capsys.readouterr().out
    assert "WRONG  b" in out and "1 of 2 agree" in out
    monkeypatch.setattr("psp_lightning.ops.check.run_checks", lambda device: iter(results[:1]))
    assert doctor._check()


def test_the_command():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "psp_lightning.cli.doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("opps")
    assert done.returncode == 1 and "Did you mean 'ops'" in done.stderr
    done = run("ops", "built=true")
    assert done.returncode == 1 and "Did you mean 'build'" in done.stderr
    done = run("ops", "build=yes")
    assert done.returncode == 1 and "build=true or build=false" in done.stderr
    done = run("--help")
    assert done.returncode == 0 and "PSP_OPS_DIR" in done.stdout


def test_a_gpu_without_kernels_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("device_count", 1), ("get_device_capability", (9, 0)), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, v=value: v)
    monkeypatch.setattr(_toolchain, "missing", lambda: "There is no ninja: pip install ninja.")
    assert not doctor.report()
    shown = lines(capsys.readouterr().out)
    assert shown["GPU 0"] == "a GPU, compute capability 9.0" and shown["architectures"] == "9.0"
    assert "no ninja" in shown["in use"]
    monkeypatch.setenv("PSP_OPS", "ref")
    assert doctor.report()

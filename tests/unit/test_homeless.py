"""Users without a home folder, as in containers that run as an arbitrary user id."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from psp_lightning.checkpoints.read import resolve
from psp_lightning.cli import doctor, latents, weights
from psp_lightning.losses.identity import IDLoss
from psp_lightning.losses.lpips import LPIPSLoss
from psp_lightning.ops.cuda import build
from psp_lightning.utils.errors import UserError
from psp_lightning.zoo import locate

pwd = pytest.importorskip("pwd")  # not on Windows
ADVICE = "no home folder .HOME is not set.: set {} to a folder"


@pytest.fixture(autouse=True)
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    for name in ("HOME", "XDG_CACHE_HOME", "PSP_WEIGHTS", "PSP_OPS_DIR", "PSP_OPS"):
        monkeypatch.delenv(name, raising=False)


def status(main, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(
    "call", [lambda: LPIPSLoss(), lambda: IDLoss(), locate.weights_dir, lambda: resolve("psp_ffhq_encode.pt")]
)
def test_weights_name_their_variable(call) -> None:
    with pytest.raises(UserError, match=ADVICE.format("PSP_WEIGHTS")):
        call()


def test_a_file_that_is_given_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alexnet.pth").write_bytes(b"x")
    assert locate.find("alexnet", tmp_path / "alexnet.pth") == tmp_path / "alexnet.pth"
    monkeypatch.setenv("PSP_WEIGHTS", str(tmp_path))
    assert locate.weights_dir() == tmp_path


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (weights.main, ["list"], "set PSP_WEIGHTS to a folder"),
        (weights.main, ["get", "alexnet", "offline=true"], "set PSP_WEIGHTS to a folder"),
        (doctor.main, ["ops"], "set PSP_OPS_DIR to a folder"),
        (latents.main, ["in=~/a.npy", "out=b.npy"], "set HOME or write the whole path"),
    ],
)
def test_commands_report_it(main, arguments, message, monkeypatch, capsys) -> None:
    assert status(main, arguments, monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_kernels_fall_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build._toolchain, "architectures", lambda: ["9.0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=ADVICE.format("PSP_OPS_DIR")):
        assert build.kernels() is None
    monkeypatch.setenv("PSP_OPS", "cuda")
    with pytest.raises(UserError, match=ADVICE.format("PSP_OPS_DIR")):
        build.kernels()

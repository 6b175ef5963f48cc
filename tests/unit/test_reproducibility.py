"""make_reproducible in fresh processes: in time, too late, with a value set by the user; the record of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from psp_lightning.cli.resume import ARITHMETIC, changed_arithmetic
from psp_lightning.utils.reproducibility import arithmetic

NEEDS_MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch comes without MKL")
PRODUCT = "import torch; torch.rand(32, 32) @ torch.rand(32, 32); "
STATE = "from psp_lightning.utils.reproducibility import arithmetic; print(arithmetic()['mkl']); "
CALL = "from psp_lightning import make_reproducible; print(make_reproducible()); "


def words(program: str, **environment: str) -> list[str]:
    """Return the words printed by a fresh process that does not inherit MKL_CBWR."""
    inherited = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env={**inherited, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ["psp_lightning", "psp_lightning.cli.mistakes", "psp_lightning.cli.train"])
def test_pytorch_is_not_imported(name: str) -> None:
    program = f"import {name}, sys; {CALL} print('torch' in sys.modules, __import__('os').environ['MKL_CBWR'])"
    assert words(program) == ["True", "False", "AUTO,STRICT"]


@NEEDS_MKL
@pytest.mark.parametrize("first", ["", "import torch; ", STATE], ids=["first of all", "PyTorch loaded", "state read"])
def test_in_time(first: str) -> None:
    assert words(f"{first}{CALL}{PRODUCT}{STATE}{CALL}")[-3:] == ["True", "AUTO,STRICT", "True"]


@NEEDS_MKL
def test_too_late() -> None:
    assert words(f"{PRODUCT}{CALL}{STATE}{CALL}") == ["False", "off", "False"]


@NEEDS_MKL
@pytest.mark.parametrize(
    ("value", "expected"), [("COMPATIBLE", ["False", "COMPATIBLE", "False"]), ("AVX2,STRICT", ["True", "True"])]
)
def test_a_value_set_by_the_user_is_kept(value: str, expected: list[str]) -> None:
    found = words(f"{CALL}{PRODUCT}{STATE}{CALL} print(__import__('os').environ['MKL_CBWR'])", MKL_CBWR=value)
    assert found[-1] == value
    # MKL names the branch AUTO instead of AVX2 on some processors
    assert [word for word in found[:-1] if not word.endswith(",STRICT")] == expected


@NEEDS_MKL
def test_child_processes_inherit_it() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PRODUCT + STATE!r}], check=True)"
    assert words(f"{CALL}{child}")[-1] == "AUTO,STRICT"


def test_arithmetic_can_be_stored_as_yaml() -> None:
    found = arithmetic()
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__ and found["processor"]


def test_changes_are_named(tmp_path: Path) -> None:
    assert changed_arithmetic(tmp_path) == [], "a run without a record must have no changes"
    now = arithmetic()
    (tmp_path / ARITHMETIC).write_text(yaml.safe_dump({**now, "threads": 77, "of another version": 1}))
    assert changed_arithmetic(tmp_path) == [f"threads: 77 -> {now['threads']}"]

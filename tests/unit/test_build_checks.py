"""Numbers of the configuration are checked before anything is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from psp_lightning.build.checks import check_numbers
from psp_lightning.utils.errors import UserError

TABLE = {"trainer.max_steps": (int, 1, math.inf), "optimizer.lr": (float, 0, 1)}


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 1.5, 0, True, "ten"],
    ids=["inf", "-inf", "nan", "1.5", "0", "true", "text"],
)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    cfg = OmegaConf.create({"trainer": {"max_steps": value}})
    with pytest.raises(UserError, match=r"trainer\.max_steps=.* must be a whole number, at least 1\."):
        check_numbers(cfg, TABLE)


def test_whole_numbers_in_float_notation_become_integers() -> None:
    cfg = OmegaConf.create({"trainer": {"max_steps": 1e4}, "optimizer": {"lr": 1}})
    OmegaConf.set_struct(cfg, True)
    check_numbers(cfg, TABLE)
    assert type(cfg.trainer.max_steps) is int and cfg.trainer.max_steps == 10_000 and cfg.optimizer.lr == 1


def test_missing_and_null_are_left_alone() -> None:
    check_numbers(OmegaConf.create({"trainer": {"max_steps": None}}), TABLE)

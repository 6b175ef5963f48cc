"""Checks of arguments, and the setting that the configuration names for a rejected one."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from psp_lightning.build.instantiate import import_plugins, instantiate, naming
from psp_lightning.build.trainer import prepare
from psp_lightning.utils.arguments import ArgumentError, choice, number, whole
from psp_lightning.utils.errors import UserError


def settings(**trainer: Any) -> DictConfig:
    cfg = OmegaConf.create({"seed": 0, "trainer": {"max_steps": 1, **trainer}, "optimizer": {"lr": 1}, "plugins": []})
    OmegaConf.set_struct(cfg, True)
    return cfg


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, 1.5, 0, True, "ten", None],
    ids=["inf", "-inf", "nan", "1.5", "0", "true", "text", "null"],
)
def test_values_that_are_not_whole_numbers_are_rejected(value: Any) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps=.* must be a whole number, at least 1\."):
        prepare(settings(max_steps=value))
    with pytest.raises(ArgumentError, match=r"n=.* must be a whole number, from 1 to 9\."):
        whole("n", value, 1, 9)


def test_whole_numbers_in_float_notation_become_integers() -> None:
    cfg = settings(max_steps=1e4)
    prepare(cfg)
    assert type(cfg.trainer.max_steps) is int and cfg.trainer.max_steps == 10_000 and cfg.optimizer.lr == 1
    assert type(whole("n", 16.0, 1)) is int


def test_null_is_accepted_if_it_is_allowed() -> None:
    assert whole("n", None, 1, optional=True) is None and number("x", None, optional=True) is None
    with pytest.raises(ArgumentError, match=r"x=None must be a number\."):
        number("x", None)


def test_numbers_keep_their_type() -> None:
    assert number("x", 0.5, 0, 1) == 0.5 and type(number("x", 1, 0, 1)) is int


def test_choices_suggest_the_closest() -> None:
    assert choice("kind", "box", ("box", "half")) == "box"
    with pytest.raises(ArgumentError, match=r"kind=bax is unknown\. Did you mean 'box'\? Choose from: box, half"):
        choice("kind", "bax", ("box", "half"))


def test_the_error_survives_a_process_boundary() -> None:
    again = pickle.loads(pickle.dumps(ArgumentError("n", 0, "must be more.")))
    assert str(again) == "n=0 must be more." and again.argument == "n"


# --- the setting that an argument comes from


def test_the_first_section_with_the_argument_is_named() -> None:
    cfg = OmegaConf.create({"data": {"limit": 0}, "domain": {"size": 3}, "store": {"limit": 0, "share": 2}})
    for argument, key in (("limit", "data.limit"), ("size", "domain.size"), ("share", "store.share")):
        with pytest.raises(UserError, match=rf"^{key}=0 must be a whole number, at least 1\.$"):
            with naming(cfg, "data", "domain", "store"):
                whole(argument, 0, 1)


STORE = "psp_lightning.data.stores.ToyFacesStore"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": STORE, "limit": 0}, r"^data\.limit=0 must be a whole number, at least 1\.$"),
        ({"_target_": STORE, "size": 8, "sise": 3}, r"there is no setting data\.train\.sise\. Did you mean 'size'\?"),
        ({"_target_": "psp_lightning.data.stores.NoStore"}, r"data\.train: .*NoStore"),
        ({"_target_": "builtins.int", "_args_": ["x"]}, r"data\.train: invalid literal"),
        ({"_target_": "builtins.int", "_args_": [[]]}, r"data\.train: .* not 'list'"),
        ({"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "mode": "up"}, r"data\.train: .*mode.* got up"),
        ({"n": 3}, r"data\.train has no _target_: .* data=NAME"),
    ],
)
def test_nodes_that_cannot_be_built(node: dict[str, Any], message: str) -> None:
    cfg = OmegaConf.create({"data": {"limit": 0, "train": node}})
    with pytest.raises(UserError, match=message):
        instantiate(cfg, "data.train", "data")


def test_an_argument_that_does_not_exist_is_named() -> None:
    cfg = OmegaConf.create({"encoder": {"width": 1, "widht": 2}})
    with pytest.raises(UserError, match=r"there is no setting encoder\.widht\. Did you mean 'width'\?"):
        with naming(cfg, "encoder"):
            (lambda width: width)(**cfg.encoder)


MINE = """
import torch
class Base:
    def __init__(self, strength=1.0):
        super().__init__()
class Adds(Base):
    def __init__(self, bins=8):
        self.name = "bins" + bins
class Passes(Base):
    def __init__(self, strength=1.0):
        super().__init__(strenght=strength)
class Torch(Base):
    def __init__(self):
        torch.zeros("two")
class Needs(Base):
    def __init__(self, bins):
        self.bins = bins
class Attribute(Base):
    def __init__(self):
        self.nothing
class Package(Base):
    def __init__(self):
        import no_such_package
class Key(Base):
    def __init__(self):
        {}["bins"]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's."""
    (tmp_path / "mine_of_test.py").write_text(MINE)
    (tmp_path / "broken_of_test.py").write_text("import no_such_package")
    (tmp_path / "package_of_test").mkdir()
    (tmp_path / "package_of_test" / "__init__.py").touch()
    (tmp_path / "package_of_test" / "broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("mine_of_test", "package_of_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "Base", "strenght": 2}, r"no setting loss\.colour\.strenght\. Did you mean 'strength'\?"),
        ({"_target_": "Base", "wieght": 2}, r"no setting loss\.colour\.wieght\. Did you mean 'weight'\?"),
        ({"_target_": "Adds"}, r"^loss\.colour: TypeError in .*mine_of_test\.py, line 8: can only concatenate str"),
        ({"_target_": "Passes"}, r"^loss\.colour: TypeError in .*line 11: .*unexpected keyword argument 'strenght'"),
        ({"_target_": "Torch"}, r"^loss\.colour: TypeError in .*mine_of_test\.py, line 14: zeros\(\)"),
        ({"_target_": "Needs"}, r"^loss\.colour: .*missing 1 required positional argument: 'bins'"),
        ({"_target_": "Attribute"}, r"^loss\.colour: AttributeError in .*line 20: .* no attribute 'nothing'"),
        ({"_target_": "Package"}, r"^loss\.colour: ModuleNotFoundError in .*line 23: No module named 'no_such"),
        ({"_target_": "Key"}, r"^loss\.colour: KeyError in .*line 26: 'bins'"),
        ({"_target_": "Bose"}, r"cannot import mine_of_test\.Bose .* Did you mean 'Base'\? .*PYTHONPATH.*plugins="),
        ({"_target_": "no_such_module.Base"}, r"cannot import no_such_module\.Base \(No module named .*PYTHONPATH"),
        ({"_target_": "broken_of_test.Base"}, r"cannot import broken_of_test\.Base \(No module named 'no_such_pack"),
    ],
)  # fmt: skip
def test_mistakes_in_a_loss_of_ones_own(node: dict[str, Any], said: str, mine: None) -> None:
    name = node["_target_"]
    target = name if "." in name else f"mine_of_test.{name}"
    cfg = OmegaConf.create({"loss": {"colour": {**node, "_target_": target, "weight": 1.0}}})
    if "wieght" in node:
        del cfg.loss.colour.weight
    with pytest.raises(UserError, match=said) as error:
        instantiate(cfg, "loss.colour", without=["weight"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("group", ["loss", "metric"])
def test_an_option_that_is_set_but_not_selected(group: str) -> None:
    cfg = OmegaConf.create({group: {"x": {"weight": 1}}})
    with pytest.raises(UserError, match=rf"{group}\.x is set but 'x' is not selected: .* {group}=\[...,x\]"):
        instantiate(cfg, f"{group}.x")


@pytest.mark.parametrize(
    ("group", "node", "said"),
    [
        (
            "loss",
            {"_target_": "mine_of_test.Base", "weight": 1},
            r"loss\._target_=.* directly below loss\. .*NAME:",
        ),
        ("logger", {"_target_": "mine_of_test.Base"}, r"logger\._target_=.* stands directly below logger"),
        ("loss", {"colour": {"target": "mine_of_test.Base"}}, r"loss\.colour has no _target_: add _target_: MODULE"),
        ("loss", {"colour": {"_target_": "Base"}}, r"_target_: Base names no module\. Write MODULE\.CLASS"),
    ],
)
def test_a_file_with_a_misplaced_target(group: str, node: dict[str, Any], said: str, mine: None) -> None:
    with pytest.raises(UserError, match=said):
        instantiate(OmegaConf.create({group: node}), f"{group}.{next(iter(node))}")


def test_an_encoder_whose_target_is_misplaced_or_not_partial(mine: None) -> None:
    cfg = OmegaConf.create({"encoder": {"tiny": {"_target_": "mine_of_test.Base"}}})
    with pytest.raises(UserError, match=r"encoder has no _target_, but encoder\.tiny has one: remove the line `tiny:`"):
        instantiate(cfg, "encoder")
    cfg = OmegaConf.create({"encoder": {"_target_": "mine_of_test.Base"}})
    with pytest.raises(UserError, match="encoder needs `_partial_: true`"):
        instantiate(cfg, "encoder")
    cfg = OmegaConf.create({"encoder": "tiny", "task": {"name": "mine"}})
    for key in ("encoder", "task.datamodule"):
        with pytest.raises(UserError, match=f"^{key} has no _target_: choose an option of its group"):
            instantiate(cfg, key)


def test_an_error_raised_in_the_standard_library_names_no_line_of_it() -> None:
    cfg = OmegaConf.create({"data": {"train": {"_target_": "fractions.Fraction", "numerator": []}}})
    with pytest.raises(UserError, match=r"^data\.train: .*Rational"):
        instantiate(cfg, "data.train")


def test_plugins(mine: None) -> None:
    import_plugins("mine_of_test")
    assert "mine_of_test" in sys.modules
    import_plugins("")
    for name, said in {
        "mine_of_tset": r"there is no module 'mine_of_tset' .*PYTHONPATH",
        "mine_of_test.py": r"Write plugins=\[mine_of_test\]: the module's name has no \.py",
        "mine_of_test.Base": r"Write plugins=\[mine_of_test\]: give the module only, not a class",
        "broken_of_test": "the module 'broken_of_test' imports 'no_such_package', which is not installed",
        "package_of_test.broken": "the module 'package_of_test.broken' imports 'no_such_package'",
        "package_of_test.borken": r"there is no module 'package_of_test.borken' .*PYTHONPATH",
    }.items():
        with pytest.raises(UserError, match=said):
            import_plugins([name])

"""Every option of every group composes; files and registries agree; every experiment is complete."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from psp_lightning._conf import config_root

CONF = Path(config_root())
GROUPS = [
    "task",
    "domain",
    "data",
    "generator",
    "encoder",
    "optimizer",
    "trainer",
    "callbacks",
    "logger",
    "model",
    "paths",
]
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
WHOLE = [(group, path.stem) for group in ("experiment", "debug") for path in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize(("group", "option"), OPTIONS + WHOLE)
def test_option_composes(group: str, option: str) -> None:
    cfg = composed(f"{group}={option}")
    assert cfg.task.name and cfg.domain.name


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [name for value in node.values() for name in targets(value)]
    return []


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_targets_exist(path: Path) -> None:
    for name in targets(yaml.safe_load(path.read_text()) or {}):
        assert callable(hydra.utils.get_object(name)), name


def test_losses_and_files_agree() -> None:
    from psp_lightning.losses import LOSSES

    files = {path.stem for path in (CONF / "loss").glob("*.yaml")}
    assert files == set(LOSSES)
    for name in files:
        node = composed(f"loss=[{name}]").loss[name]
        assert hydra.utils.get_class(node["_target_"]) is LOSSES[name]
        assert "weight" in node


def test_tasks_and_files_agree() -> None:
    from psp_lightning.data.datamodules import DATAMODULES

    assert {path.stem for path in (CONF / "task").glob("*.yaml")} == set(DATAMODULES)
    for name in DATAMODULES:
        assert composed(f"task={name}").task.name == name


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiment_says_how_it_is_run(path: Path) -> None:
    assert f"experiment={path.stem}" in path.read_text(), "the header must hold the command"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiment_needs_nothing_but_the_generator(name: str) -> None:
    missing = OmegaConf.missing_keys(composed(f"experiment={name}", "paths.output_dir=x"))
    assert missing <= {"generator.path"}, missing


def test_paper_weights() -> None:
    """The weights of the published training commands."""
    published = {
        "ffhq_inversion": {"l2": 1, "lpips": 0.8, "id": 0.1},
        "ffhq_frontalization": {
            "l2": 0.001,
            "lpips": 0.08,
            "l2_crop": 0.01,
            "lpips_crop": 0.8,
            "id": 1,
            "w_norm": 0.005,
        },
        "celebs_sketch2face": {"l2": 1, "lpips": 0.8, "w_norm": 0.005},
        "celebs_seg2face": {"l2": 1, "lpips": 0.8, "w_norm": 0.005},
        "celebs_superres": {"l2": 1, "lpips": 0.8, "id": 0.1, "w_norm": 0.005},
        "ffhq_toonify": {"l2": 1, "lpips": 0.8, "id": 1, "w_norm": 0.025},
    }
    for name, weights in published.items():
        cfg = composed(f"experiment={name}")
        assert {key: node.weight for key, node in cfg.loss.items()} == weights, name
        assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.val_every) == (1e-4, 8, 2500)
        assert cfg.optimizer["_target_"].endswith("Ranger") and cfg.model.start_from_latent_avg

"""Every option of every group composes, files and registries agree, and every experiment is complete."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli.mistakes import flat

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


# --- psp-train-generator: its own groups, and those shared with psp-train

MAKER = CONF / "generator_training"
MAKER_OPTIONS = [(path.parent.name, path.stem) for path in sorted(MAKER.glob("*/*.yaml"))]
SHARED = [
    (group, path.stem) for group in ("trainer", "logger", "paths") for path in sorted((CONF / group).glob("*.yaml"))
]


def composed_generator(*overrides: str):
    importlib.import_module("psp_lightning.cli.train_generator")  # registers the resolver of the search path
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(MAKER), version_base="1.3"):
        return compose("train_generator", overrides=list(overrides))


@pytest.mark.parametrize(("group", "option"), sorted({*MAKER_OPTIONS, *SHARED}))
def test_generator_option_composes(group: str, option: str) -> None:
    cfg = composed_generator(f"{group}={option}")
    assert cfg.task.name == "generator" and cfg.network.style_dim and cfg.trainer.max_steps
    assert hydra.utils.get_class(cfg.data.images["_target_"])


def composed_evaluation(*overrides: str):
    importlib.import_module("psp_lightning.cli.evaluate")  # registers the resolver of the search path
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF / "evaluation"), version_base="1.3"):
        return compose("evaluate", overrides=list(overrides))


@pytest.mark.parametrize(
    "choice", ["data=toyfaces", "data=folder", "embed=optimize", "refine=none", "refine=features", "refine=optimize"]
)
def test_evaluation_option_composes(choice: str) -> None:
    cfg = composed_evaluation(choice)
    assert cfg.data.store["_target_"] and cfg.domain.identity == cfg.data.identity
    assert set(cfg.metric) == {"mse", "psnr", "ssim", "id_similarity"}
    assert ("losses" in cfg.refine, cfg.embed is not None) == (choice == "refine=optimize", choice == "embed=optimize")


def test_ranks_of_an_evaluation_are_counted_without_a_network() -> None:
    from psp_lightning.build.evaluation import count_ranks

    cfg = composed_evaluation("ckpt=missing.ckpt", "data.limit=5", "batch_size=2")
    assert [count_ranks(cfg, wanted) for wanted in (1, 2, 8)] == [1, 2, 3], "at most one for each batch"


def test_generator_trainers_match_psp_train_except_for_defaults() -> None:
    cfg = composed_generator("trainer=ddp_cpu")
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.strategy) == ("cpu", 2, "ddp")
    assert "precision" not in cfg.trainer and "val_every" not in cfg.trainer
    assert composed_generator("trainer=cpu", "trainer.devices=2").trainer.devices == 2
    assert composed_generator("trainer=ddp").trainer.devices == "auto"
    assert not composed_generator("logger=none").logger
    assert set(composed_generator("logger=tensorboard").logger) == {"csv", "tensorboard"}


def test_generator_settings_and_code_agree() -> None:
    from psp_lightning.lit.generator import Recipe

    cfg = composed_generator()
    names = {field.name: field for field in dataclasses.fields(Recipe)}
    for key, value in cfg.model.items():
        if key not in ("half", "half_blocks"):
            assert names[key].default == value, f"model.{key}"
    assert names.keys() - cfg.model.keys() == {"ada_every", "path_decay"}, "arguments without a setting"


def test_all_generator_run_variants_compose_with_every_domain() -> None:
    for path in sorted((MAKER / "domain").glob("*.yaml")):
        cfg = composed_generator(f"domain={path.stem}")
        assert cfg.domain.name == cfg.data.name == path.stem
        assert {"root", "size", "seed"} & set(cfg.data.images)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "domain").glob("ffhq*.yaml")))
def test_domains_keep_their_backbone(name: str) -> None:
    """A later entry of the defaults list must not override it."""
    assert composed(f"domain={name}").model.backbone == "ir_se50"
    assert composed("domain=toyfaces").model.backbone is None


def test_every_setting_that_is_text_exists() -> None:
    from psp_lightning.cli.settings import TEXT

    training = composed(
        "data=folder", "generator=file", "loss=[l2,id,lpips,lpips_crop,moco,perceptual]", "logger=wandb"
    )
    others = [composed("task=seg2face", "logger=tensorboard"), composed("task=inpainting"), composed_generator()]
    others.append(composed_evaluation())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        others += [compose("predict"), compose("doctor")]
    known = {path.name for path in (*CONF.iterdir(), *MAKER.iterdir())}
    known.update(key for cfg in (training, *others) for key in flat(OmegaConf.to_container(cfg)))
    assert TEXT - known == {"hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"}


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if node.get("_target_", "???") != "???" else []  # ???: the user's file has it
        return own + [name for value in node.values() for name in targets(value)]
    return []


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_targets_exist(path: Path) -> None:
    for name in targets(yaml.safe_load(path.read_text()) or {}):
        assert callable(hydra.utils.get_object(name)), name


def test_every_encoder_has_a_file() -> None:
    importlib.import_module("psp_lightning.models.encoders")  # fills the registry
    encoders = importlib.import_module("psp_lightning.models.registry").ENCODERS
    files = [yaml.safe_load(path.read_text()) for path in (CONF / "encoder").glob("*.yaml")]
    ours = {name for name, cls in encoders.items() if cls.__module__ == "psp_lightning.models.encoders"}
    assert ours == {node["_target_"].rpartition(".")[2] for node in files}


def test_losses_and_files_agree() -> None:
    from psp_lightning.losses import LOSSES

    files = {path.stem for path in (CONF / "loss").glob("*.yaml")}
    assert files == set(LOSSES)
    for name in files:
        node = composed(f"loss=[{name}]").loss[name]
        assert hydra.utils.get_class(node["_target_"]) is LOSSES[name]
        assert "weight" in node


def test_metrics_are_selected_as_a_list() -> None:
    from psp_lightning.metrics import METRICS

    files = {path.stem for path in (CONF / "metric").glob("*.yaml")}
    assert files == set(METRICS)
    assert set(composed().metric) == {"mse", "psnr", "id_similarity"}
    for name in files:
        for cfg in (composed(f"metric=[{name}]"), composed_evaluation(f"metric=[{name}]")):
            assert list(cfg.metric) == [name]
            assert hydra.utils.get_class(cfg.metric[name]["_target_"]) is METRICS[name]
    assert set(composed("~metric.psnr").metric) == {"mse", "id_similarity"}


def test_metrics_that_need_a_term_follow_the_losses() -> None:
    from psp_lightning.build.training import build_losses, build_metrics

    for losses, expected in (("[l2]", ["mse", "psnr"]), ("[l2,id]", ["mse", "psnr", "id_similarity"])):
        cfg = composed(f"loss={losses}")
        metrics = build_metrics(cfg, build_losses(cfg))
        assert list(metrics) == expected, losses


def test_tasks_and_files_agree() -> None:
    from psp_lightning.data.datamodules import DATAMODULES

    assert {path.stem for path in (CONF / "task").glob("*.yaml")} == set(DATAMODULES)
    for name in DATAMODULES:
        assert composed(f"task={name}").task.name == name


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiment_file_shows_its_command(path: Path) -> None:
    assert f"experiment={path.stem}" in path.read_text(), "the header must contain the command"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiment_needs_nothing_but_the_generator(name: str) -> None:
    missing = OmegaConf.missing_keys(composed(f"experiment={name}", "paths.output_dir=x"))
    assert missing <= {"generator.path"}, missing


def test_paper_weights() -> None:
    """The loss weights are those of the published training commands."""
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

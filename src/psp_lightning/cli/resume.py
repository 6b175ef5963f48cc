"""`resume=`: continue a run in its directory, with its recorded settings and the changes on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from psp_lightning._conf import config_root
from psp_lightning.cli.mistakes import config_dir, flat
from psp_lightning.cli.ranks import share
from psp_lightning.cli.settings import is_sweep, plain, quote, quote_text, separate, split
from psp_lightning.lit.run_folder import LAST, last_checkpoint
from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.compat import OVERRIDES
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.reproducibility import arithmetic

ARITHMETIC = "arithmetic.yaml"

# --- the command line


def with_resume(arguments: list[str], config: str = "train") -> list[str]:
    """Quote the paths and names on a command line and expand `resume=`.

    `resume=RUN` or `resume=RUN/checkpoints/X.ckpt` continues RUN with the settings that it was started with; settings
    on the command line override them. `resume=auto` continues the newest run of the task, or the run named by `run=`.
    If there is no such run, it starts a new one.

    Args:
        arguments: the command line.
        config: the command's configuration below `config_root`.

    Raises:
        UserError: the run or checkpoint does not exist, or `resume=` is combined with `-m` or `hydra.run.dir=`.
    """
    arguments = quote_text(arguments)
    options, given = separate(arguments)
    settings = dict(map(split, given))
    wanted = settings.pop("resume", None)
    if wanted in (None, "null"):
        return arguments
    if is_sweep(options):
        raise UserError("resume= continues one run; leave out -m.")
    if wanted == "auto":
        given = [argument for argument in given if not argument.startswith("resume=")]
        # chosen once: a rank that looks later could find another run
        found = share(lambda: _text(_newest(options, given, "run" in settings, config)))
        if found is None:
            return options + given
        checkpoint = Path(found)
    else:
        path = Path(plain(wanted))
        last = path if path.is_file() else last_checkpoint(path)
        if last is None:
            raise UserError(
                f"resume={path}: there is no {path / LAST if path.is_dir() else path}. Give a run directory, one of "
                "its checkpoints, or auto."
            )
        checkpoint = last
    if "hydra.run.dir" in settings:
        raise UserError("resume= continues in the run's own directory; leave out hydra.run.dir.")
    run = checkpoint.parent.parent
    if (run / "config.yaml").is_file():
        settings["hydra.run.dir"] = _literal(run)
    merged = {**_recorded_settings(run), **settings, "resume": _literal(checkpoint)}
    return [*options, *(key if value is None else f"{key}={value}" for key, value in merged.items())]


def _recorded_settings(run: Path) -> dict[str, str | None]:
    """Return the settings that a run was started with, as this version spells them."""
    file = run / "overrides.yaml"
    lines = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    settings = dict(split(OVERRIDES.get(line, line)) for line in lines or ())
    settings.pop("init_from", None)  # the checkpoint contains the weights
    return settings


def _literal(path: Path) -> str:
    """Return a path for a command line of Hydra, without interpolation."""
    return quote(os.fspath(path.resolve()).replace("${", "\\${"))


def _text(path: Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def _newest(options: list[str], settings: list[str], named: bool, config: str) -> Path | None:
    """Return the last checkpoint of the task's newest run, or of the run named by `run=`; the settings are composed."""
    overrides = list(settings)
    if own := config_dir(options):
        places = [quote(f"file://{os.path.abspath(place)}") for place in (own, config_root())]
        overrides.append(f"hydra.searchpath=[{','.join(places)}]")
    folder, name = os.path.split(os.path.join(config_root(), config))
    with initialize_config_dir(folder, version_base="1.3"):
        cfg = compose(name, overrides)
    runs = Path(cfg.paths.runs, cfg.task.name)
    nested = (path.parent for path in runs.rglob("checkpoints"))  # a name may be exp/a; no link is followed
    found = map(last_checkpoint, [runs / str(cfg.run)] if named else {*runs.glob("*"), *nested})
    return max(filter(None, found), key=lambda path: path.stat().st_mtime, default=None)


# --- the composed settings

# A resume may not change these settings. It may change data, trainer and callbacks, and logs each change.
FIXED = (
    "task.", "encoder.", "refiner.", "generator.", "domain.", "optimizer.", "model.", "network.", "editability.", "seed"
)  # fmt: skip
FREE = ("model.compile", "model.checkpointing")  # these change speed and memory, but no results
ADDED = {"model.loss_per_pass": False}  # what runs did before this setting existed
# not in version 0.1.0, or with other keys there
NEW_KEYS = (
    "metric.", "callbacks.", "logger.", "data.generated_share", "data.truncation", "data.mixing", "data.noise"
)  # fmt: skip


def refuse_changes(run: Path, cfg: DictConfig) -> list[str]:
    """Return `key: before -> now` for each setting that differs from the run's recorded ones.

    Raises:
        UserError: a setting differs that a resume may not change.
    """
    recorded = run / "config.yaml"
    if not recorded.is_file():
        return []
    now = plain_settings(OmegaConf.to_container(cfg, resolve=True))
    before = {key: value for key, value in ADDED.items() if key in now}  # psp-train-generator does not have them
    before |= plain_settings(yaml.safe_load(recorded.read_text(encoding="utf-8")))
    keys = sorted({*before, *now} - {"resume", "init_from", "run"})
    if "callbacks.last._target_" not in before:  # recorded by version 0.1.0
        keys = [key for key in keys if (key in before and key in now) or not key.startswith(NEW_KEYS)]
    lines = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}
    fixed_keys: tuple[str, ...] = FIXED
    if now.get("model.batch_norm") == "machine":  # the devices of a machine share statistics
        fixed_keys += ("trainer.devices",)
    if fixed := [line for key, line in lines.items() if key.startswith(fixed_keys) and key not in FREE]:
        raise UserError(
            f"resume= cannot change {'; '.join(fixed)}. Leave this out, or start a new run from the weights with "
            f"init_from={cfg.resume}."
        )
    return list(lines.values())


def changed_arithmetic(run: Path) -> list[str]:
    """Return `key: before -> now` for each value of `arithmetic` that differs from the run's recorded one."""
    recorded = run / ARITHMETIC
    if not recorded.is_file():
        return []
    before, now = flat(yaml.safe_load(recorded.read_text(encoding="utf-8"))), arithmetic()
    return [f"{key}: {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]


def record(run: Path, cfg: DictConfig) -> None:
    """Record the composed settings (config.yaml), the overrides (overrides.yaml) and `arithmetic` (arithmetic.yaml)."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task)
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg, resolve=True),
        "overrides.yaml": yaml.safe_dump(given, allow_unicode=True),
        ARITHMETIC: yaml.safe_dump(arithmetic(), allow_unicode=True, sort_keys=False),
    }
    for name, text in files.items():
        with replacing(run / name) as part:
            part.write_text(text, encoding="utf-8")


def plain_settings(container: Any) -> dict[str, Any]:
    """Return a configuration's values by dotted key; leave out our classes' modules, which may change."""
    return {
        key: value.rpartition(".")[2] if key.endswith("._target_") and "psp_lightning." in str(value) else value
        for key, value in flat(container).items()
    }

"""`resume=`: a run's own settings and directory, put before what the command line adds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from psp_lightning.utils.atomic import replacing
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.reproducibility import arithmetic

LAST = Path("checkpoints") / "last.ckpt"
ARITHMETIC = "arithmetic.yaml"


def with_resume(arguments: list[str], family: str | None = None) -> list[str]:
    """Rewrite a command line that has `resume=`.

    `resume=RUN` or `resume=RUN/checkpoints/X.ckpt` goes on in RUN with the settings that it was started with; later
    settings on the command line win. `resume=auto` takes the newest run of the task, or the one named by `run=`, and
    starts a new run where there is none.

    Args:
        family: first part of the run directories; None: the task.

    Raises:
        UserError: no such run or checkpoint; together with `-m`.
    """
    settings = dict(_split(argument) for argument in arguments if not argument.startswith("-"))
    wanted = settings.pop("resume", None)
    if wanted in (None, "null"):
        return arguments
    flags = _flags(arguments)
    for flag in flags:
        settings.pop(flag, None)  # the value of an option, as in --config-dir DIR
    if {"-m", "--multirun"} & set(flags):
        raise UserError("resume= goes on with one run; leave out -m.")
    if wanted == "auto":
        checkpoint = _newest(settings, family or settings.get("task") or "inversion")
        if checkpoint is None:
            return [argument for argument in arguments if not argument.startswith("resume=")]
    else:
        checkpoint = _checkpoint(Path(str(wanted).strip("'\"")))
    if "hydra.run.dir" in settings:
        raise UserError("resume= goes on in the run's own directory: leave out hydra.run.dir.")
    run = checkpoint.parent.parent
    recorded = run / "overrides.yaml"
    before: dict[str, str | None] = {}
    if recorded.is_file():
        before = dict(_split(line) for line in yaml.safe_load(recorded.read_text()) or ())
    if (run / "config.yaml").is_file():
        settings["hydra.run.dir"] = _quote(run)
    before.pop("init_from", None)  # the checkpoint holds the weights by now
    merged = {**before, **settings, "resume": _quote(checkpoint)}
    return [*flags, *(key if value is None else f"{key}={value}" for key, value in merged.items())]


def _split(argument: str) -> tuple[str, str | None]:
    key, sign, value = argument.partition("=")
    return key, value if sign else None


def _flags(arguments: list[str]) -> list[str]:
    """Options of Hydra itself with their values: whatever is no `key=value`, `+key`, `~key`."""
    flags, takes_value = [], False
    for argument in arguments:
        if argument.startswith("-"):
            flags.append(argument)
            takes_value = "=" not in argument
        elif takes_value and "=" not in argument and not argument.startswith(("+", "~")):
            flags.append(argument)
            takes_value = False
        else:
            takes_value = False
    return flags


def _quote(path: Path) -> str:
    return "'" + os.fspath(path.resolve()).replace("'", "\\'") + "'"


def _checkpoint(path: Path) -> Path:
    candidate = path / LAST if path.is_dir() else path
    if not candidate.is_file():
        raise UserError(
            f"resume={path}: no checkpoint at {candidate}. Give a run directory, one of its checkpoints, or auto."
        )
    return candidate


def _newest(settings: dict[str, str | None], family: str) -> Path | None:
    runs = Path(settings.get("paths.runs") or os.environ.get("PSP_RUNS") or "runs")
    name = settings.get("run") or "*"
    found = list((runs / family).glob(f"{name}/{LAST}"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


# What makes a run the run that it is. Data, trainer and callbacks may change; the log says what did.
FIXED = ("task.", "encoder.", "generator.", "domain.", "optimizer.", "model.", "network.", "seed")
FREE = ("model.compile", "model.checkpointing")  # of speed and memory alone


def refuse_changes(run: Path, cfg: DictConfig) -> list[str]:
    """`key: before -> now` for each setting that differs from the run's recorded ones.

    Raises:
        UserError: one of them makes it another run.
    """
    recorded = run / "config.yaml"
    if not recorded.is_file():
        return []
    before, now = _flat(yaml.safe_load(recorded.read_text())), _flat(OmegaConf.to_container(cfg, resolve=True))
    keys = [key for key in sorted({*before, *now} - {"resume", "init_from", "run"}) if before.get(key) != now.get(key)]
    lines = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys}
    if fixed := [lines[key] for key in keys if key.startswith(FIXED) and key not in FREE]:
        raise UserError(
            f"resume= goes on with the run as it was started, which does not allow {'; '.join(fixed)}. Leave this out, "
            f"or start a new run from its weights with init_from={run / LAST}."
        )
    return list(lines.values())


def changed_arithmetic(run: Path) -> list[str]:
    """Return `key: before -> now` for each value of `arithmetic` that differs from the run's recorded one."""
    recorded = run / ARITHMETIC
    if not recorded.is_file():
        return []
    before, now = _flat(yaml.safe_load(recorded.read_text())), arithmetic()
    return [f"{key}: {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]


def record(run: Path, cfg: DictConfig) -> None:
    """Write the settings of a run, composed (config.yaml) and as they were given (overrides.yaml), and what its last
    bits depend on (arithmetic.yaml)."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task)
    files = {
        "config.yaml": OmegaConf.to_yaml(cfg, resolve=True),
        "overrides.yaml": yaml.safe_dump(given, allow_unicode=True),
        ARITHMETIC: yaml.safe_dump(arithmetic(), allow_unicode=True, sort_keys=False),
    }
    for name, text in files.items():
        with replacing(run / name) as part:
            part.write_text(text)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}

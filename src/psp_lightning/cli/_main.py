"""What every command shares: readable errors, exit codes, help from the shipped configuration."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.reproducibility import make_reproducible

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


# settings whose values are paths or names: people write them as in a shell, without Hydra's own quotes
PATHS = (
    "ckpt", "input", "output", "init_from", "resume", "run", "generator.path", "paths.runs",
    "mix.reference", "mask.dir",
    "data.root", "data.source", "data.target", "data.val_root", "data.val_source", "data.val_target",
)  # fmt: skip


def quote_paths(arguments: list[str]) -> list[str]:
    """Put values of `PATHS` that Hydra's grammar would not take as they are into its quotes; not in a sweep."""
    if {"-m", "--multirun"} & set(arguments):
        return arguments
    quoted = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        plain = re.fullmatch(r"[\w./:~-]*", value, re.ASCII) or value[:1] in "'\"["
        if sign and key in PATHS and not plain:
            argument = key + "='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        quoted.append(argument)
    return quoted


class Told(BaseException):
    """Carries a `UserError` past Hydra, which would print the overrides and a hint before it."""


def user_errors(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorator below `hydra.main`: in a single run a `UserError` leaves Hydra as `Told`; in a sweep, where the other
    jobs are to go on, it stays an exception of its job."""

    @functools.wraps(task)
    def run(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            return task(cfg)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno is None:
                raise
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            raise Told(_words(error)) from None

    return run


def guard(run: Callable[[], object]) -> None:
    """Call a command's function, reproducibly; a user's mistake becomes one message and status 1, ctrl-C status 130."""
    make_reproducible()  # before anything imports PyTorch
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its exceptions on, so that they are worded here
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        run()
    except (UserError, Told) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error))
    except ValueError as error:
        if "Config group override must be" not in str(error):  # Hydra has no exception of its own for logger=null
            raise
        _fail(_no_option(sys.argv[1:]) or str(error))
    except BrokenPipeError:  # the reader of a pipe, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(_words(error))


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}"
    return str(error)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def explain(error: Exception) -> str:
    """Hydra's or OmegaConf's error in words that name the culprit and the closest match."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text):
        return _unknown_option(match[1], match[2], match[3].split())
    if match := re.search(r"Could not load '([\w/]+)/([^'/]+)'", text):
        return _unknown_option(match[1], match[2])
    if match := re.search(r"Could not override 'loss\.(\w+)(?:\.[\w.]+)?'", text):
        return unselected_loss(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return f"there is no configuration key '{key}'.{_closest_key(key)} All keys: --cfg job; new ones: +{key}=..."
    if match := re.search(r"missing EQUAL at|mismatched input|LexerNoViableAlt|token recognition", text):
        return (
            f"{text.splitlines()[0]}\nSettings are written KEY=VALUE; a value with special characters: \"KEY='VALUE'\""
        )
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} must be given on the command line: {match[1]}=..."
    return text


def _unknown_option(group: str, name: str, options: list[str] | None = None) -> str:
    options = options or _shipped(group)
    return f"{group}={name} does not exist.{suggest(name, options)} Choose from: {', '.join(options)}"


def _no_option(arguments: list[str]) -> str | None:
    """The message for the first of the arguments that gives a group a value which names none of its files."""
    for argument in arguments:
        group, sign, value = argument.partition("=")
        if sign and value not in (options := _shipped(group)) and options and value[:1] != "[":
            return _unknown_option(group, value, options)
    return None


def _shipped(group: str) -> list[str]:
    from psp_lightning._conf import config_root

    folders = [os.path.join(config_root(), group)]
    if "train_generator" in os.path.basename(sys.argv[0]).replace("-", "_"):
        folders.append(os.path.join(config_root(), "generator_training", group))
    names = [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]
    return sorted({name.removesuffix(".yaml") for name in names if name.endswith(".yaml")})


def unselected_loss(name: str) -> str:
    """The message for a weight without its term."""
    options = _shipped("loss")
    if name in options:
        return (
            f"loss.{name} is set but the term '{name}' is not selected: add it to the list, "
            f"loss=[l2,{name}] (its file is conf/loss/{name}.yaml)"
        )
    return f"there is no loss '{name}'.{suggest(name, options)} Choose from: {', '.join(options)}"


def _closest_key(key: str) -> str:
    """The closest existing key, looked up in the configuration that the other arguments give."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from psp_lightning._conf import config_root

    GlobalHydra.instance().clear()
    command, folder = os.path.basename(sys.argv[0]).replace("-", "_"), config_root()
    name = "predict" if "predict" in command else "train"
    if "train_generator" in command:
        name, folder = "train_generator", os.path.join(folder, "generator_training")
    try:
        with initialize_config_dir(folder, version_base="1.3"):
            groups = [item for item in sys.argv[1:] if "=" in item and _shipped(item.partition("=")[0])]
            cfg = OmegaConf.to_container(compose(name, overrides=groups), resolve=False)
    except Exception:  # the suggestion is a courtesy: without it the message still names the key
        return ""
    keys: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for child, value in node.items():
                keys.append(f"{prefix}{child}")
                walk(value, f"{prefix}{child}.")

    walk(cfg, "")
    return suggest(key, keys)

"""Reports of mistakes, the same in all commands: one readable message, no traceback, an exit code."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.utils.reproducibility import make_reproducible

OWN_GROUPS = {"train_generator": "generator_training", "evaluate": "evaluation"}  # command -> its folder in conf/


class Report(BaseException):
    """A message that Hydra passes on unchanged; before a `UserError`, it would print the overrides and a hint."""


def user_errors(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate the function below `hydra.main`: check for missing settings and turn a user's mistake into a `Report`.

    In a sweep, the error stays an exception of its job, because the other jobs must still run.
    """

    @functools.wraps(task)
    def run(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf

        make_reproducible()  # for jobs of a sweep in other processes, which `guard` has not prepared
        try:
            if missing := sorted(OmegaConf.missing_keys(cfg)):
                raise UserError("must be given: " + " ".join(f"{key}=..." for key in missing))
            return task(cfg)
        except (UserError, OSError) as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN or (isinstance(error, OSError) and error.errno is None):
                raise
            raise Report(message(error)) from None

    return run


def guard(run: Callable[[], object], prepare: Callable[[list[str]], list[str]] | None = None) -> None:
    """Call a command's function with reproducible arithmetic.

    A user's mistake ends in one message and status 1, ctrl-C or SIGTERM in status 130.

    Args:
        run: the function.
        prepare: changes the command line before the call.
    """
    make_reproducible()  # before anything imports PyTorch
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as for stderr, for names that the locale cannot print
    end_on_sigterm()
    # conf/ has commented files for launchers that also have a schema in Hydra's store
    warnings.filterwarnings("ignore", r"\s*'hydra/(launcher|sweeper)/.*' is validated against ConfigStore schema")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.process")  # the same, in joblib
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its exceptions, and `explain` rewords them
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    try:
        if prepare is not None:
            sys.argv[1:] = prepare(sys.argv[1:])
        run()
    except (UserError, Report) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a configuration file"
        fail(f"{place}: this is not YAML: {error.problem or error.context}.")
    except ValueError as error:
        if "Config group override must be" not in str(error):  # Hydra has no exception class for logger=null
            raise
        fail(_wrong_option(sys.argv[1:]) or str(error))
    except RuntimeError as error:
        if missing := re.search(r"Unknown plugin class : 'hydra_plugins\.hydra_(\w+?)_launcher\.", str(error)):
            extra = {"submitit": "slurm"}.get(missing[1], missing[1])
            fail(f"the package hydra-{missing[1]}-launcher is not installed: pip install 'psp-lightning[{extra}]'")
        if type(error).__module__.startswith(("submitit.", "joblib.")) or "srun" in str(error):
            fail(f"a job of the sweep did not run: {error}")
        if "home directory" not in str(error):  # pathlib's error for a path with ~
            raise
        fail("~ in a path cannot be replaced, because this user has no home folder: set HOME or write the whole path.")
    except BrokenPipeError:  # the reader of a pipe, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        fail(message(error))


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as ctrl-C does.

    Lightning's Trainer ignores SIGTERM unless a handler exists, so a prediction would continue to its end.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def message(error: Exception) -> str:
    """Return a user's mistake or a failure of the disk as one message."""
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}"
    return str(error)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def explain(error: Exception) -> str:
    """Return a message for an error of Hydra or OmegaConf that names the culprit and the closest match."""
    text = str(error).removeprefix("UserError raised while resolving interpolation: ")
    if match := re.search(r"Could not find '([\w/]+)/([^'/]*)'\s+Available options in '[^']+':((?:\n\t\S+)+)", text):
        return _unknown_option(match[1], match[2], match[3].split())
    if match := re.search(r"Could not load '([\w/]+)/([^'/]+)'", text):
        return _unknown_option(match[1], match[2])
    if match := re.search(r"Could not override '([^']+)'", text):
        inner = getattr(error.__cause__, "full_key", None) or ""  # with KEY={entry: value}, the entry
        return _unknown_key(max(match[1], inner, key=len), _composed(error.__cause__))
    if match := re.search(r"Ambiguous value for argument '(.+?)=(.*)'", text):
        key, values = match.groups()
        return f"{key}={values} is ambiguous. Write a list as {key}=[{values}]; add -m to run one job for each value."
    if match := re.search(r"missing EQUAL at|mismatched input|LexerNoViableAlt|token recognition", text):
        return f"{text.splitlines()[0]}\nWrite settings as KEY=VALUE; quote special characters: \"KEY='VALUE'\""
    if match := re.search(r"Interpolation key '(.+)' not found\s+full_key: (\S+)", text):
        return f"{match[2]} refers to {match[1]}, which is not set: a file of yours lacks it or misspells it."
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} must be given on the command line: {match[1]}=..."
    return text


def _unknown_key(key: str, composed: dict[str, Any]) -> str:
    """Return the message for a key that the composed configuration does not contain."""
    from psp_lightning.build.instantiate import LISTS, not_selected

    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if group in LISTS and name and name not in (composed.get(group) or {}):
        if name in (options := _options(group)):
            return not_selected(group, name)
        return f"there is no {group} '{name}'.{suggest(name, options)} Choose from: {', '.join(options)}"
    leaves = flat(composed)
    known = {".".join(leaf.split(".")[:n]) for leaf in leaves for n in range(1, leaf.count(".") + 2)}
    known = {name for name in known if not key.startswith(f"{name}.")}  # these exist, so they were not meant
    return (
        f"there is no configuration key '{key}'.{suggest(key, known)} --cfg job lists all keys; +{key}=... adds a new "
        "one."
    )


def _unknown_option(group: str, name: str, options: list[str] | None = None) -> str:
    options = options or _options(group)
    return f"{group}={name} does not exist.{suggest(name, options)} Choose from: {', '.join(options)}"


def _wrong_option(arguments: Sequence[str]) -> str | None:
    """Return the message for the first argument that gives a group a value other than its options."""
    for argument in arguments:
        group, sign, value = argument.partition("=")
        if sign and value not in (options := _options(group)) and options and value[:1] != "[":
            return _unknown_option(group, value, options)
    return None


def config_dir(arguments: Sequence[str]) -> str | None:
    """Return the folder that `--config-dir` gives."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c")  # otherwise -c is read as an abbreviation of -cd
    return parser.parse_known_args(arguments)[0].config_dir


def _options(group: str) -> list[str]:
    """Return the options of a group."""
    from psp_lightning._conf import config_root

    folders = [os.path.join(folder, group) for folder in (config_root(), config_dir(sys.argv[1:])) if folder]
    command = os.path.basename(sys.argv[0]).replace("-", "_")
    folders += [os.path.join(config_root(), home, group) for name, home in OWN_GROUPS.items() if name in command]
    names = [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]
    return sorted({name.removesuffix(".yaml") for name in names if name.endswith(".yaml")})


def _composed(error: BaseException | None) -> dict[str, Any]:
    """Return the composed configuration, which OmegaConf's error refers to."""
    from omegaconf import OmegaConf

    node = getattr(error, "parent_node", None)
    found: Any = {} if node is None else OmegaConf.to_container(node._get_root(), resolve=False)
    return found


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys."""
    if not isinstance(node, dict):
        return {key: node}
    return {k: v for name, value in node.items() for k, v in flat(value, f"{key}.{name}".lstrip(".")).items()}

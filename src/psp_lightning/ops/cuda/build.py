"""Build and load the CUDA kernels at their first use, once for all processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch

from psp_lightning.ops.cuda import toolchain as _toolchain
from psp_lightning.ops.cuda.choice import choice
from psp_lightning.utils.cache import cache_dir
from psp_lightning.utils.errors import UserError

LIBRARY, RECORD = f"{_toolchain.NAME}.so", "build.json"
TIME_LIMIT = 1800  # seconds for the compiler
LOCK_LIMIT = TIME_LIMIT + 60  # seconds to wait while another process compiles
SHOWN = 12  # lines of compiler output in a warning


class BuildError(Exception):
    """The kernels could not be built; the message is for the user."""


_outcome: tuple[Any, str] | None = None  # the namespace of the kernels, or None and the reason
_guards: dict[str, threading.Lock] = {}


def ops_dir() -> Path:
    """Return the folder of built kernels: `$PSP_OPS_DIR`, or `psp_lightning/ops` in the user's cache folder."""
    if chosen := os.environ.get("PSP_OPS_DIR"):
        return Path(chosen).expanduser()
    return cache_dir("PSP_OPS_DIR") / "ops"


def kernels() -> Any:
    """Build the kernels if necessary, load them and return their namespace; None if plain PyTorch must be used.

    A failure warns once, and this process does not try again.

    Raises:
        UserError: PSP_OPS=cuda, but the kernels cannot be built or loaded.
    """
    found, reason = _outcome or _decide()
    if found is None and choice() == "cuda":
        raise UserError(f"PSP_OPS=cuda, but there are no kernels. {reason}")
    return found


def _decide() -> tuple[Any, str]:
    global _outcome
    with _guards.setdefault("decide", threading.Lock()):  # autograd runs its own threads
        if _outcome is None:
            try:
                found = load(ensure_built(_toolchain.architectures()))
                try_launch(found)
                _outcome = found, ""
            except (BuildError, UserError) as error:  # a UserError: there is no folder for the kernels
                _outcome = None, str(error)
                if choice() != "cuda":  # with "cuda", `kernels` raises an error
                    warnings.warn(
                        f"Plain PyTorch is used instead of the CUDA kernels. {error}\n{_toolchain.ADVICE} "
                        "Run psp-doctor ops for details.",
                        stacklevel=2,
                    )
        return _outcome


def load(library: Path) -> Any:
    """Load a built library and return the namespace of its operators.

    Raises:
        BuildError: the library cannot be loaded.
    """
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from error
    return torch.ops.psp_lightning_cuda


def try_launch(kernels: Any) -> None:
    """Launch a kernel on the current GPU, because a library for other GPUs loads without an error.

    Raises:
        BuildError: the launch fails.
    """
    if torch.cuda.is_current_stream_capturing():  # cannot wait for a result
        return
    gpu = f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    x = torch.ones(1, 1, device="cuda")
    out = torch.zeros_like(x)
    try:
        kernels.epilogue(out, x, None, None, [], None, None, None, None, 1.0, 2.0, -1.0)
        problem = "" if float(out) == 2 else "the result is wrong"
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise BuildError(f"The kernels do not run on this GPU ({gpu}): {problem}. {_built_for()}")


def _built_for() -> str:
    listed = " (TORCH_CUDA_ARCH_LIST)" if os.environ.get("TORCH_CUDA_ARCH_LIST") else ""
    return f"They are built for {' '.join(_toolchain.architectures())}{listed}."


def ensure_built(architectures: list[str]) -> Path:
    """Return the library for these architectures. If it does not exist, one process builds it while the others wait.

    Raises:
        BuildError: there is no GPU to build for, something is missing, or the compiler fails.
    """
    if not architectures:
        raise BuildError("There is no GPU to build for. To build for one anyway, set e.g. TORCH_CUDA_ARCH_LIST=9.0.")
    key = _toolchain.key(architectures)
    folder = ops_dir() / key
    if is_complete(folder):
        return folder / LIBRARY
    if problem := _toolchain.missing():
        raise BuildError(problem)
    try:
        ops_dir().mkdir(parents=True, exist_ok=True)
        return _build_once(folder, architectures)
    except OSError as error:
        message = f"{error.filename or folder}: {error.strerror or error}. Set PSP_OPS_DIR to another folder."
        raise BuildError(message) from None


def is_complete(folder: Path) -> bool:
    """Return whether `folder` has a library that matches the SHA-256 in its record."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return record["sha256"] == _sha256(folder / LIBRARY)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build_once(folder: Path, architectures: list[str]) -> Path:
    failure = folder.with_name(f"{folder.name}.failed")
    before = _content(failure)
    with _lock(folder):
        if is_complete(folder):
            return folder / LIBRARY
        if (failed := _content(failure)) != before:  # failed in another process while this one waited
            raise BuildError(failed.partition("\n")[2])
        try:
            with _scratch(folder) as scratch:
                _compile(scratch, architectures)
                _install(scratch, folder)
        except BuildError as error:
            failure.write_text(f"{uuid.uuid4().hex}\n{error}")
            raise
        failure.unlink(missing_ok=True)
        return folder / LIBRARY


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait for the lock of `folder` and hold it. The system releases it when its owner dies for any reason.

    The lock only saves time: if two processes build anyway, the rename in `_install` keeps the result correct.
    """
    path = folder.with_name(f"{folder.name}.lock")
    try:
        with filelock.FileLock(path, timeout=LOCK_LIMIT):
            yield
    except filelock.Timeout:
        raise BuildError(
            f"Another process has held {path} for {LOCK_LIMIT} s. End it, or set PSP_OPS_DIR to another folder."
        ) from None
    except NotImplementedError as error:
        raise BuildError(f"{path} cannot be locked ({error}). Set PSP_OPS_DIR to another folder.") from error


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a folder for one attempt, next to the final one so that a rename can install it."""
    for left in folder.parent.glob(f"{folder.name}.build-*"):  # left by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 2 * TIME_LIMIT:
                shutil.rmtree(left, ignore_errors=True)
    scratch = folder.with_name(f"{folder.name}.build-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_command(scratch: Path) -> list[str]:
    """Return the command that builds `LIBRARY` in `scratch`."""
    # this process may have found the package only through a changed sys.path
    program = f"import sys; sys.path[:] = {sys.path!r}; from psp_lightning.ops.cuda.compile import main; main()"
    return [sys.executable, "-c", program, str(scratch)]


def _compile(scratch: Path, architectures: list[str]) -> None:
    log = scratch / "build.log"
    env = {**_toolchain.environment(), "TORCH_CUDA_ARCH_LIST": ";".join(architectures), "CXX": _toolchain.compiler()}
    if home := _toolchain.cuda_home():
        env["CUDA_HOME"] = str(home)
    with log.open("wb") as output:
        child = subprocess.Popen(
            build_command(scratch), stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            code = child.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:  # too slow, or this process was interrupted: end the compilers as well
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if code != 0 or not (scratch / LIBRARY).is_file():
        what = f"did not finish in {TIME_LIMIT} s" if code is None else f"failed (status {code})"
        raise BuildError(f"The compiler {what}. It says:\n{compiler_message(log.read_text(errors='replace'))}")


# What compilers, linkers, ninja and the shell print about an error, such as "a.cu(35): error: ...",
# "nvcc fatal   : ...", "ld: cannot find -lcudart", "sh: 1: c++: not found", "Killed".
_ERROR = re.compile(
    r"\b(error|fatal)\b.*:|: error\b|undefined (reference|symbol)|cannot find|not found|[Kk]illed|No space left"
)
_COMMAND = re.compile(r"\[\d+/\d+\] |FAILED: |\S*(nvcc|c\+\+|g\+\+|clang\S*) .* -c ")


def compiler_message(log: str) -> str:
    """Return the lines of a build's output that tell what is wrong: the compiler's errors, each with its source line.

    If there are no such lines, return the last lines, or the message of the exception that ended the build. Leave out
    the traceback of PyTorch's builder, which follows the compiler's output and says nothing about it.
    """
    output, _, traceback = log.partition("Traceback (most recent call last):\n")
    lines = [line for line in output.splitlines() if line.strip() and not _COMMAND.match(line)]
    errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
    if errors:
        near = sorted({k for i in errors for k in range(i, min(i + 3, len(lines)))})  # the source line and its marker
        return "\n".join(lines[k] for k in near[:SHOWN])
    raised = re.split(r"^(?=[\w.]+: )", traceback, flags=re.MULTILINE)  # not indented, unlike the frames
    return "\n".join([*lines, *raised[-1].splitlines()][-SHOWN:] if len(raised) > 1 else lines[-SHOWN:])


def _install(scratch: Path, folder: Path) -> None:
    """Record the library and move it into place, unless another process has already installed one."""
    record = {
        "sha256": _sha256(scratch / LIBRARY),
        "torch": torch.__version__,
        "toolkit": str(_toolchain.cuda_home()),
        "built": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    for path in scratch.iterdir():
        if path.name not in (LIBRARY, "build.log"):
            path.unlink()
    (scratch / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    with (scratch / LIBRARY).open("rb") as file:
        os.fsync(file.fileno())
    if folder.exists() and not is_complete(folder):  # it was damaged later: an installed folder was complete
        aside = folder.with_name(f"{folder.name}.build-damaged-{uuid.uuid4().hex[:8]}")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(scratch, folder)
    except OSError:
        if not is_complete(folder):
            raise

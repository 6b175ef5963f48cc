"""Load tensors strictly: every difference between a file and its network is an error or is reported."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from psp_lightning.utils.errors import UserError, clean

NetT = TypeVar("NetT", bound=nn.Module)


@dataclass(frozen=True)
class LoadReport:
    """What `load_strict` did with each key."""

    what: str
    matched: tuple[str, ...] = field(default=())
    adapted: tuple[str, ...] = field(default=())
    missing: tuple[str, ...] = field(default=())
    unexpected: tuple[str, ...] = field(default=())
    refused: tuple[str, ...] = field(default=())

    @property
    def loaded(self) -> int:
        """Number of tensors that were loaded."""
        return len(self.matched) + len(self.adapted)

    def __str__(self) -> str:
        text = f"{self.what}: {self.loaded} tensors loaded"
        if self.adapted:
            text += f", {len(self.adapted)} of them adapted ({first(self.adapted)})"
        if self.missing:
            text += f", {len(self.missing)} left as they were ({first(self.missing)})"
        if self.unexpected:
            text += f", {len(self.unexpected)} not used ({first(self.unexpected)})"
        return text

    def rows(self, depth: int = 1) -> list[tuple[str, int, str]]:
        """Return part of the network (the first `depth` pieces of a key), number of tensors, what became of them."""
        counts: dict[tuple[str, str], int] = {}
        results = {
            "matched": self.matched, "adapted": self.adapted, "left as it was": self.missing,
            "not used": self.unexpected, "refused": self.refused,
        }  # fmt: skip
        for result, keys in results.items():
            for key in keys:
                part = ".".join(key.split(".")[:depth])
                counts[part, result] = counts.get((part, result), 0) + 1
        return [(part, count, result) for (part, result), count in counts.items()]


class WeightsMismatch(UserError):
    """Weights that do not fit their network; `report` says which."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def first(names: Iterable[str], n: int = 5) -> str:
    """List the first names, for a message."""
    names = list(names)
    return ", ".join(map(clean, names[:n])) + (", ..." if len(names) > n else "")


def load_strict(
    module: nn.Module,
    state: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    what: str = "",
    adapt: Iterable[str] = (),
) -> LoadReport:
    """Load `state` into `module`; every difference that is not allowed by name is an error.

    Args:
        module: changed only when everything fits.
        state: key to tensor.
        allow_missing: shell patterns of keys that `state` may lack; they keep their values.
        allow_unexpected: shell patterns of keys that `module` may lack; they are ignored.
        what: name for messages; default: the module's class.
        adapt: shell patterns of convolution weights that may have another number of input channels, see
            `adapt_channels`.

    Raises:
        WeightsMismatch: listing the first missing, unexpected and mismatched keys.
    """
    report = compare(module, state, allow_missing, allow_unexpected, what, adapt)
    own = module.state_dict()
    loaded = {key: state[key] for key in report.matched}
    loaded |= {key: adapt_channels(state[key], own[key].shape[1]) for key in report.adapted}
    module.load_state_dict(loaded, strict=False)
    return report


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Change a convolution's weight to another number of input channels.

    Args:
        weight: (O, I, k, k).
        channels: of the new input. One: the sum over the old ones, so that a grey image gives what it gave as RGB.
            Fewer: the first ones. More: zeros for the new ones, so that at first they change nothing.

    Returns:
        (O, channels, k, k).
    """
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    if channels <= given:
        return weight[:, :channels].clone()
    more = weight.new_zeros(weight.shape[0], channels - given, *weight.shape[2:])
    return torch.cat([weight, more], dim=1)


def compare(
    module: nn.Module,
    state: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    what: str = "",
    adapt: Iterable[str] = (),
) -> LoadReport:
    """Return what `load_strict` would do, with its errors; change nothing."""
    what = what or type(module).__name__
    own = module.state_dict()
    allow_missing, allow_unexpected, adapt = tuple(allow_missing), tuple(allow_unexpected), tuple(adapt)
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    other = [key for key, tensor in own.items() if key in state and _shape(state[key]) != _shape(tensor)]
    adapted = [key for key in other if _matches(key, adapt) and _differ_in_channels(state[key], own[key])]
    bad = {
        "missing": [key for key in missing if not _matches(key, allow_missing)],
        "unexpected": [key for key in unexpected if not _matches(key, allow_unexpected)],
        "of another shape": [key for key in other if key not in adapted],
    }
    refused = tuple(key for keys in bad.values() for key in keys)
    different, not_allowed = set(other), set(refused)
    report = LoadReport(
        what,
        matched=tuple(key for key in own if key in state and key not in different),
        adapted=tuple(adapted),
        missing=tuple(key for key in missing if key not in not_allowed),
        unexpected=tuple(key for key in unexpected if key not in not_allowed),
        refused=refused,
    )
    if refused:
        shown = {**bad, "of another shape": [
            f"{key} ({_shape(state[key])} instead of {_shape(own[key])})" for key in bad["of another shape"]
        ]}  # fmt: skip
        problems = [f"{len(keys)} {label}: {first(keys)}" for label, keys in shown.items() if keys]
        message = f"The weights do not fit {what} ({len(own)} tensors). " + "; ".join(problems) + "."
        raise WeightsMismatch(message, report)
    return report


def _differ_in_channels(given: Any, own: Tensor) -> bool:
    """Tell whether two weights of convolutions differ only in their input channels."""
    if not isinstance(given, Tensor) or given.ndim != 4 or own.ndim != 4:
        return False
    return (given.shape[0], *given.shape[2:]) == (own.shape[0], *own.shape[2:])


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


@contextlib.contextmanager
def wrap_errors(path: Path) -> Iterator[None]:
    """Turn what a nonsensical file does to the code that interprets it into one message; keep the random state."""
    try:
        with torch.random.fork_rng(devices=[]):  # building a network draws first weights, which are then replaced
            yield
    except WeightsMismatch as error:
        raise WeightsMismatch(f"Checkpoint {path}: {error}", error.report) from None
    except UserError as error:
        raise UserError(f"Checkpoint {path}: {str(error)[:1500]}") from None
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"Checkpoint {path} does not hold what it seems to ({type(error).__name__}: {clean(str(error), 300)})."
        ) from error


def build_and_load(
    make: Callable[[], NetT],
    state: Mapping[str, Any],
    what: str,
    allow_missing: Iterable[str] = (),
    adapt: Iterable[str] = (),
) -> NetT:
    """Build the network that a file describes, with the file's tensors.

    A description is only text and may ask for anything. The network is therefore built without memory first and
    compared with the tensors, which exist.

    Args:
        make: builds the network.
        state, what, allow_missing, adapt: see `load_strict`.

    Raises:
        UserError: the tensors do not fit the described network.
    """
    allow_missing, adapt = tuple(allow_missing), tuple(adapt)
    with _at_most(modules=20 * len(state) + 10_000, tensors=2 * len(state) + 2_000):
        try:
            with torch.device("meta"):
                sketch = make()
        except UserError as error:
            if "meta" not in str(error):  # an own class may compute while it is built
                raise
        else:
            compare(sketch, state, allow_missing, what=what, adapt=adapt)
        net = make()
    load_strict(net, state, allow_missing, what=what, adapt=adapt)
    return net


@contextlib.contextmanager
def _at_most(modules: int, tensors: int) -> Iterator[None]:
    """Stop the construction of networks with more parts than that."""
    count = {"modules": modules, "tensors": tensors}

    def used(kind: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            count[kind] -= 1
            if count[kind] < 0:
                raise UserError("its description asks for a network far larger than its tensors.")

        return hook

    handles = [
        registration.register_module_module_registration_hook(used("modules")),
        registration.register_module_parameter_registration_hook(used("tensors")),
        registration.register_module_buffer_registration_hook(used("tensors")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

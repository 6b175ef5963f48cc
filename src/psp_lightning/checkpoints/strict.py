"""Load tensors strictly: every difference between a file and its network is an error or is reported."""

from __future__ import annotations

import contextlib
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registration

from psp_lightning.utils.errors import UserError, clean

NetT = TypeVar("NetT", bound=nn.Module)


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_strict` for each key."""

    what: str
    matched: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def loaded(self) -> int:
        """The number of loaded tensors."""
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
        """Return (part of the network, number of tensors, result); a part is the first `depth` pieces of a key."""
        results = {
            "matched": self.matched, "adapted": self.adapted, "left as it was": self.missing,
            "not used": self.unexpected, "refused": self.refused,
        }  # fmt: skip
        counts = Counter((".".join(key.split(".")[:depth]), result) for result, keys in results.items() for key in keys)
        return [(part, count, result) for (part, result), count in counts.items()]


class WeightsMismatch(UserError):
    """Weights that do not fit their network; `report` lists them."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def first(names: Iterable[str], n: int = 5) -> str:
    """Return the first `n` names as text for a message."""
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
    """Load `state` into `module`; any difference that is not explicitly allowed is an error.

    Args:
        module: changed only if everything fits.
        allow_missing: shell patterns of keys that `state` may lack; the module keeps its values.
        allow_unexpected: shell patterns of keys that `module` may lack; they are ignored.
        what: name of the network in messages, by default the class of `module`.
        adapt: shell patterns of convolution weights that may have another number of input channels, see
            `adapt_channels`.

    Raises:
        WeightsMismatch: the message lists the first missing, unexpected and mismatched keys.
    """
    report = compare(module, state, allow_missing, allow_unexpected, what, adapt)
    own = module.state_dict()
    loaded = {key: state[key] for key in report.matched}
    loaded |= {key: adapt_channels(state[key], own[key].shape[1]) for key in report.adapted}
    module.load_state_dict(loaded, strict=False)
    return report


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Change the number of input channels of a convolution's weight (O, I, k, k).

    A single channel gets the sum of the old channels, so a grey image gives the same result as before in RGB.
    Otherwise, the first channels are kept, and added channels start at zero, where they have no effect.

    Returns:
        (O, channels, k, k).
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return F.pad(weight, (0, 0, 0, 0, 0, channels - weight.shape[1]))


def compare(
    module: nn.Module,
    state: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    what: str = "",
    adapt: Iterable[str] = (),
) -> LoadReport:
    """Return the report of `load_strict`, or raise its errors, without changing `module`."""
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
    """Return whether two convolution weights differ only in their input channels."""
    if not isinstance(given, Tensor) or given.ndim != 4 or own.ndim != 4:
        return False
    return (given.shape[0], *given.shape[2:]) == (own.shape[0], *own.shape[2:])


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


@contextlib.contextmanager
def wrap_errors(path: Path) -> Iterator[None]:
    """Turn any error that a nonsensical file causes into one message; keep the random state."""
    try:
        with torch.random.fork_rng(devices=[]):  # building a network draws initial weights
            yield
    except WeightsMismatch as error:
        raise WeightsMismatch(f"Checkpoint {path}: {error}", error.report) from None
    except UserError as error:
        raise UserError(f"Checkpoint {path}: {str(error)[:1500]}") from None
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"Checkpoint {path} has unexpected contents ({type(error).__name__}: {clean(str(error), 300)})."
        ) from error


def build_and_load(
    make: Callable[[], NetT],
    state: Mapping[str, Any],
    what: str,
    allow_missing: Sequence[str] = (),
    adapt: Sequence[str] = (),
) -> NetT:
    """Build the network that a file describes and load the file's tensors.

    A description may ask for a network of any size. The network is therefore first built on the meta device, without
    memory, and compared with the tensors, which really exist.

    Args:
        state, what, allow_missing, adapt: see `load_strict`.

    Raises:
        UserError: the tensors do not fit the described network.
    """
    with _at_most(modules=20 * len(state) + 10_000, tensors=2 * len(state) + 2_000):
        try:
            with torch.device("meta"):
                sketch = make()
        except UserError as error:
            if "meta" not in str(error):  # a custom class may compute while it is built
                raise
        else:
            compare(sketch, state, allow_missing, what=what, adapt=adapt)
        net = make()
    load_strict(net, state, allow_missing, what=what, adapt=adapt)
    return net


@contextlib.contextmanager
def _at_most(modules: int, tensors: int) -> Iterator[None]:
    """Raise a UserError when more modules or tensors are registered in the block."""
    left = {"modules": modules, "tensors": tensors}

    def counter(kind: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            left[kind] -= 1
            if left[kind] < 0:
                raise UserError("its description asks for a network far larger than its tensors.")

        return hook

    with (
        registration.register_module_module_registration_hook(counter("modules")),
        registration.register_module_parameter_registration_hook(counter("tensors")),
        registration.register_module_buffer_registration_hook(counter("tensors")),
    ):
        yield

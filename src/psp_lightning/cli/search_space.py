"""The settings that a search chooses: Optuna's distributions from ranges in Hydra's grammar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer

from psp_lightning.cli.trial import optuna_package
from psp_lightning.utils.errors import UserError


def search_space(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the Optuna distribution of each setting that has a range, and the settings that have one value.

    Args:
        overrides: settings in Hydra's grammar. The last one of a setting counts.

    Raises:
        UserError: a function of Hydra's grammar cannot be searched.
    """
    space: dict[str, Any] = {}
    fixed: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.get_key_element()
        space.pop(name, None)
        fixed.pop(name, None)
        if override.is_sweep_override():
            space[name] = _distribution(override)
        else:
            fixed[name] = str(override.input_line)
    return space, list(fixed.values())


def _distribution(override: Override) -> Any:
    """Return the Optuna distribution of a setting with a range; raise a UserError if there is none."""
    optuna = optuna_package()
    value: Any = override.value()
    numbers = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
    try:
        if override.is_interval_sweep():
            integers = isinstance(value.start, int) and isinstance(value.end, int)
            return numbers[integers](value.start, value.end, log="log" in value.tags)
        if override.is_range_sweep() and not value.shuffle:
            if not value.step:
                raise ValueError("the step must not be 0")
            integers = all(isinstance(part, int) for part in (value.start, value.stop, value.step))
            n = math.ceil((value.stop - value.start) / value.step - 1e-9)  # `stop` is not in the range
            return numbers[integers](value.start, value.start + (n - 1) * value.step, step=value.step)
        if override.is_choice_sweep() or override.is_range_sweep():
            return optuna.distributions.CategoricalDistribution(
                list(override.sweep_iterator(transformer=Transformer.encode))
            )
    except (ValueError, TypeError) as error:
        raise UserError(f"{override.input_line}: {error}") from error
    raise UserError(f"{override.input_line}: a search takes interval(A,B), choice(A,B) and range(A,B).")

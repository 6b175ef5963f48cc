"""The training objective: a weighted sum of loss terms."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psp_lightning.losses.base import LOSSES, LossInputs, LossTerm, TermOutput, full_precision
from psp_lightning.utils.errors import UserError, suggest


class CompositeLoss(nn.Module):
    """The weighted sum of loss terms.

    A term with weight 0 is computed without a graph, only for the log.

    Args:
        terms: terms by name; the names are the log keys.
        weights: weights by name, finite numbers >= 0, with the same names as `terms`.

    Raises:
        UserError: there are no terms, a weight has no term, a term has no weight or cannot be called with a
            `LossInputs`, a weight is not a finite number >= 0, or all weights are 0.

    Source: pSp, section 3.2, eq. 5.
    """

    def __init__(self, terms: Mapping[str, LossTerm], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not terms:
            raise UserError("No loss is selected. Choose at least one, e.g. loss=[l2].")
        for name in weights:
            if name not in terms:
                selected = ",".join(terms)
                hint = f" Add it: loss=[{selected},{name}]." if name in LOSSES else suggest(name, [*terms, *LOSSES])
                raise UserError(
                    f"loss.{name}.weight is set, but the loss '{name}' is not selected.{hint} Selected: {selected}."
                )
        for name in terms:
            _check_term(name, terms[name])
            if name not in weights:
                raise UserError(f"The loss '{name}' has no weight: set loss.{name}.weight.")
            weight = weights[name]
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise UserError(f"loss.{name}.weight must be a finite number >= 0, not {weight!r}.")
        if not any(weights.values()):
            raise UserError(f"All selected losses have weight 0 ({', '.join(terms)}), so nothing would be trained.")
        self.terms = nn.ModuleDict(terms)
        self.weights = {name: float(weights[name]) for name in terms}

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute every term in float32 with autocast off.

        Returns:
            The objective, a scalar with a graph; and detached float32 scalars: the unweighted value of each term under
            its name, then the terms' own logs. Nothing waits for the device. A term is left out if an input that it
            `needs` is missing.

        Raises:
            UserError: a term returns something other than one number in a tensor, or all are left out.
        """
        with full_precision(inputs.y_hat.device):
            inputs = inputs.float()
            total = inputs.y_hat.new_zeros(())
            values: dict[str, Tensor] = {}
            logs: dict[str, Tensor] = {}
            for name, term in self.terms.items():
                if any(getattr(inputs, key) is None for key in getattr(term, "needs", ())):
                    continue
                weight = self.weights[name]
                with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                    output = term(inputs)
                if isinstance(output, TermOutput):
                    logs.update(output.logs)
                    output = output.value
                _check_output(name, term, output)
                values[name] = output.detach()
                if weight != 0:  # 0 * value would carry a NaN into the sum
                    total = total + weight * output
        if not values:
            raise UserError(
                f"None of the losses ({', '.join(self.terms)}) can be computed on these samples. Add one that compares "
                "images, such as l2."
            )
        return total, {**values, **logs}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())


def _check_term(name: str, term: Any) -> None:
    """Raise a UserError unless `term` is a module that takes one argument."""
    if not isinstance(term, nn.Module):
        made = f"; write {term.__name__}(...)" if inspect.isclass(term) else ""
        raise UserError(f"The loss '{name}' must be an instance of a LossTerm, not {term!r}{made}.")
    try:
        inspect.signature(term.forward).bind(None)
    except TypeError as error:
        raise UserError(
            f"The loss '{name}': {type(term).__name__}.forward is called with one argument, a LossInputs ({error})."
        ) from None


def _check_output(name: str, term: nn.Module, output: Any) -> None:
    """Raise a UserError unless `output` is a tensor with one value."""
    if isinstance(output, Tensor) and output.numel() == 1:
        return
    what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise UserError(
        f"The loss '{name}': {type(term).__name__}.forward returned {what}. Return one number as a tensor, averaged "
        "over the batch, or a TermOutput that contains it."
    )

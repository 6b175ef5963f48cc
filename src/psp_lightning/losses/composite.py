"""The training objective: a weighted sum of loss terms."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        UserError: there are no terms, a weight has no term, a term has no weight, a weight is not a finite number >= 0,
            or all weights are 0.

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
            its name, then the terms' own logs. Nothing waits for the device.
        """
        with full_precision(inputs.y_hat.device):
            inputs = inputs.float()
            total = inputs.y_hat.new_zeros(())
            values: dict[str, Tensor] = {}
            logs: dict[str, Tensor] = {}
            for name, term in self.terms.items():
                weight = self.weights[name]
                with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                    output = term(inputs)
                if isinstance(output, TermOutput):
                    logs.update(output.logs)
                    output = output.value
                values[name] = output.detach()
                if weight != 0:  # 0 * value would carry a NaN into the sum
                    total = total + weight * output
        return total, {**values, **logs}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

"""Ranger: rectified Adam on centralised gradients, with lookahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from psp_lightning.utils.errors import UserError


class Ranger(torch.optim.RAdam):
    """RAdam + gradient centralisation + lookahead, the optimizer of the pSp paper.

    Each gradient of two or more dimensions loses its mean over all dimensions but the first. Every `k` steps of a
    parameter its slow copy, taken just before its first step, moves by `alpha` towards it, and it jumps there.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; the paper's recipe uses 1e-4.
        alpha: lookahead's step, in (0, 1].
        k: fast steps per slow step, >= 1.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled (`p <- (1 - lr * weight_decay) p`), not part of the gradient.

    Raises:
        UserError: alpha or k out of range.

    Source: Liu et al. 2020 (RAdam), Yong et al. 2020 (gradient centralisation), Zhang et al. 2019 (lookahead), with
        the defaults and order of Ranger 20.4.11, against which trajectories were checked. torch's RAdam shares its
        threshold of 5, place of eps and unrectified first steps.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        alpha: float = 0.5,
        k: int = 6,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 < alpha <= 1:
            raise UserError(f"Ranger: alpha must lie in (0, 1], not {alpha}.")
        if k < 1 or int(k) != k:
            raise UserError(f"Ranger: k must be a whole number >= 1, not {k}.")
        beta1, beta2 = betas  # a tuple, whatever sequence a config gives: it is saved in checkpoints
        super().__init__(
            params, lr, (float(beta1), float(beta2)), eps, weight_decay=weight_decay, decoupled_weight_decay=True
        )
        self.defaults.update(alpha=alpha, k=k)
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure`, if given, is called once, first, with gradients enabled, and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            slow = {}
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    if p.grad.ndim > 1:
                        p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True))
                    if not self.state[p]:  # RAdam sets up its own state on finding none: the copy joins it below
                        slow[p] = p.detach().clone()
            super().step()
            for p, start in slow.items():
                self.state[p]["slow"] = start
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if int(state["step"]) % group["k"] == 0:  # `step` lies on the CPU: nothing waits
                        state["slow"].lerp_(p, group["alpha"])
                        p.copy_(state["slow"])
        return loss

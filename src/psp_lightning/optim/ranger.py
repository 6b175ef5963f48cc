"""Ranger: rectified Adam with centralised gradients and lookahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.radam import radam

from psp_lightning.utils.errors import UserError

CPU_BATCH = 1 << 20  # elements per batch of a step on the CPU


class Ranger(torch.optim.RAdam):
    """RAdam with gradient centralisation and lookahead, the optimizer of the pSp paper.

    The mean over all dimensions but the first is subtracted from gradients with two or more dimensions. A slow copy of
    each parameter is taken before its first step. After every `k` steps of a parameter, its slow copy moves by `alpha`
    towards it, and the parameter is set to the slow copy.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; the paper's recipe uses 1e-4.
        alpha: step of the lookahead, in (0, 1].
        k: fast steps per slow step, >= 1.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled from the gradient, `p <- (1 - lr * weight_decay) p`.

    Raises:
        UserError: alpha or k is out of range.

    Source: Liu et al. 2020 (RAdam), Yong et al. 2020 (gradient centralisation), Zhang et al. 2019 (lookahead), with
        the defaults and order of Ranger 20.4.11, against which trajectories were checked. torch's RAdam agrees in the
        threshold of 5, the place of eps and the unrectified first steps.
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
        beta1, beta2 = betas  # a config may give a list, but checkpoints store a tuple
        super().__init__(
            params, lr, (float(beta1), float(beta2)), eps, weight_decay=weight_decay, decoupled_weight_decay=True
        )
        self.defaults.update(alpha=alpha, k=k)
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step; `closure`, if given, is called first with gradients enabled, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for params in self._batches(group["params"]):
                    for p in params:
                        if p.grad is not None and p.grad.ndim > 1:
                            p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True))
                    self._rectified_adam(params, group)
                    due = [p for p in params if int(self.state[p]["step"]) % group["k"] == 0]  # on the CPU: no waiting
                    if due:
                        slow = [self.state[p]["slow"] for p in due]
                        torch._foreach_lerp_(slow, due, group["alpha"])
                        torch._foreach_copy_(due, slow)
        return loss

    def _batches(self, params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the parameters with gradients, grouped by device, dtype, number of steps and memory layout.

        On the CPU the groups are small, so that the gradients stay in the processor's cache.
        """
        alike: dict[Any, list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise UserError("Ranger supports no sparse gradients: build the embedding with sparse=False.")
            state = self.state[p]
            if not state:  # the first three as in RAdam
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["slow"] = p.detach().clone()
            alike.setdefault((p.device, p.dtype, int(state["step"]), _can_fuse(p, state)), []).append(p)
        for (device, *_), group in alike.items():
            batch: list[Tensor] = []
            size = 0
            for p in group:
                batch.append(p)
                size += p.numel()
                if device.type == "cpu" and size >= CPU_BATCH:
                    yield batch
                    batch, size = [], 0
            if batch:
                yield batch

    def _rectified_adam(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Make a step of RAdam.

        On the CPU, rectified steps use PyTorch's fused Adam, which takes one pass over memory. The rectification is
        included in its learning rate, and its epsilon is scaled to RAdam's definition.
        """
        states = [self.state[p] for p in params]
        keys = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([state[key] for state in states] for key in keys)
        gradients = [p.grad for p in params]
        beta1, beta2 = group["betas"]
        lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
        step = int(steps[0]) + 1
        rectification = _rectification(step, beta2)
        usual = not any(group.get(key) for key in ("maximize", "capturable", "differentiable"))
        usual = usual and group.get("decoupled_weight_decay", True) and params[0].device.type == "cpu"
        if rectification and usual and _can_fuse(params[0], states[0]):
            # in memory order, because the fused kernel would copy channels_last gradients
            stored = [[_as_stored(t) for t in some] for some in (params, gradients, averages, squares)]  # type: ignore[arg-type]
            adamw(
                stored[0], stored[1], stored[2], stored[3], [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=lr * rectification, weight_decay=decay / rectification,
                eps=eps / math.sqrt(1 - beta2**step),
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)  # the fused step does not do this
        else:
            names = ("decoupled_weight_decay", "foreach", "differentiable", "capturable", "maximize")
            options = {name: group[name] for name in names if name in group}
            radam(
                params, gradients, averages, squares, steps, has_complex=any(p.is_complex() for p in params),  # type: ignore[arg-type]
                beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=eps, **options,
            )  # fmt: skip


def _rectification(step: int, beta2: float) -> float:
    """Return RAdam's factor (equation 4 of its paper); 0 in the first steps, which omit the second moment."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:
        return 0.0
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def _can_fuse(p: Tensor, state: dict[str, Any]) -> bool:
    """Return whether all tensors of a parameter have one memory layout, which PyTorch's fused Adam assumes."""
    if p.is_complex():
        return False
    tensors = (p.grad, state["exp_avg"], state["exp_avg_sq"])
    return all(t.stride() == p.stride() and t.dtype == p.dtype for t in tensors if t is not None)


def _as_stored(t: Tensor) -> Tensor:
    """Return a view with the dimensions in memory order."""
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True))

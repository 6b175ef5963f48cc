"""Ranger: rectified Adam on centralised gradients, with lookahead."""

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

CPU_BATCH = 1 << 20  # numbers that a step takes at a time on the CPU


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
        """Parameters that have a gradient and went as many steps, all of a device at once; on the CPU few at a time, so
        that each finds its gradient in the processor's cache."""
        alike: dict[Any, list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise UserError("Ranger takes no sparse gradients: build the embedding with sparse=False.")
            state = self.state[p]
            if not state:  # as RAdam's own
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["slow"] = p.detach().clone()
            alike.setdefault((p.device, p.dtype, int(state["step"]), _can_fuse(p, state)), []).append(p)
        for (device, *_), found in alike.items():
            batch: list[Tensor] = []
            numbers = 0
            for p in found:
                batch.append(p)
                numbers += p.numel()
                if device.type == "cpu" and numbers >= CPU_BATCH:
                    yield batch
                    batch, numbers = [], 0
            if batch:
                yield batch

    def _rectified_adam(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """RAdam's step; on the CPU, once it is rectified, as Adam's, which PyTorch has in one pass over memory: its
        learning rate takes the rectification, its epsilon the place that RAdam gives it."""
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
            # as they lie in memory: of channels_last gradients the fused kernel would make copies
            stored = [[_as_stored(t) for t in some] for some in (params, gradients, averages, squares)]  # type: ignore[arg-type]
            adamw(
                stored[0], stored[1], stored[2], stored[3], [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=lr * rectification, weight_decay=decay / rectification,
                eps=eps / math.sqrt(1 - beta2**step),
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)  # the fused step changes them unnoticed
        else:
            names = ("decoupled_weight_decay", "foreach", "differentiable", "capturable", "maximize")
            options = {name: group[name] for name in names if name in group}
            radam(
                params, gradients, averages, squares, steps, has_complex=any(p.is_complex() for p in params),  # type: ignore[arg-type]
                beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=eps, **options,
            )  # fmt: skip


def _rectification(step: int, beta2: float) -> float:
    """RAdam's factor (equation 4 of its paper); 0 in the first steps, which go without the second moment."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:
        return 0.0
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def _can_fuse(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether all tensors of a parameter lie in memory in one order, which PyTorch's fused Adam takes for granted."""
    if p.is_complex():
        return False
    tensors = (p.grad, state["exp_avg"], state["exp_avg_sq"])
    return all(t.stride() == p.stride() and t.dtype == p.dtype for t in tensors if t is not None)


def _as_stored(t: Tensor) -> Tensor:
    """A view with the dimensions in the order of memory."""
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True))

"""The structure that makes training fast is kept. It is checked by counting operations, not by timing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Convolutions(TorchDispatchMode):
    """Record the groups of every convolution and count the weight gradients computed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[int, int]] = []  # groups, input channels
        self.weight_gradients: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.groups.append((args[8], args[0].shape[1]))
        if name == "convolution_backward" and args[10][1]:
            self.weight_gradients[tuple(args[2].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def module(weights: dict[str, str], overrides: list[str]) -> Any:
    """Build the module that psp-train would train, with all terms of the paper's recipe and w_norm."""
    from benchmarks.compare.ours import module_for
    from benchmarks.compare.rows import FLOAT32, Job

    return module_for(Job("train", 32, 2, FLOAT32, "cpu", weights, overrides))


def batch(n: int) -> dict[str, Any]:
    image = torch.rand(n, 3, 64, 64) * 2 - 1
    return {"source": image, "target": image, "path": [""] * n}


def step(module: Any, n: int) -> Convolutions:
    module.zero_grad()
    with Convolutions() as found:
        module.training_step(batch(n), 0)["loss"].backward()
    return found


def test_no_convolution_is_grouped_by_the_batch(module: Any):
    two, three = step(module, 2), step(module, 3)
    assert two.groups, "no convolution was recorded"
    assert two.groups == three.groups, "groups or channels of a convolution depend on the batch size"


def test_nothing_frozen_gets_a_gradient(module: Any):
    found = step(module, 2)
    trained = {id(p) for p in module.net.encoder.parameters()}
    frozen = [(name, p) for name, p in module.named_parameters() if id(p) not in trained]
    assert frozen and not [name for name, p in frozen if p.requires_grad or p.grad is not None]
    convolutions = [m for m in module.net.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    computed = sum(found.weight_gradients.values())
    assert 0 < computed <= len(convolutions), (
        f"{computed} weight gradients were computed for {len(convolutions)} trained convolutions"
    )


@pytest.mark.parametrize("term", ["id", "lpips"])
def test_a_loss_network_sees_each_image_once(module: Any, term: str):
    seen: list[int] = []
    network = module.losses.terms[term].network
    part = network.net if term == "lpips" else network
    handle = part.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape[0]))
    step(module, 3)
    handle.remove()
    # source and target are the same image: 3 targets, 3 outputs
    assert sum(seen) == 6, f"the network of {term} saw {sum(seen)} images in {len(seen)} calls"

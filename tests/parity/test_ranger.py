"""Ranger against the trajectory of the reference's optimizer (pSp at commit 5cfff38), and its building blocks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from psp_lightning.optim import Ranger


def network(golden) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    net.load_state_dict(golden.state_dict(shapes, "ranger."))
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, golden, steps: int) -> list[float]:
    x = torch.from_numpy(golden.normal("ranger.x", 8, 3, 8, 8))
    y = torch.from_numpy(golden.normal("ranger.y", 8, 2))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def test_trajectory(golden, reference):
    net = network(golden)
    losses = train(net, Ranger(net.parameters(), lr=1e-2), golden, 25)
    np.testing.assert_allclose(losses, reference["ranger.losses"], rtol=1e-5)
    np.testing.assert_allclose(net[0].weight.detach(), reference["ranger.conv_weight"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net[4].bias.detach(), reference["ranger.linear_bias"], rtol=1e-5, atol=1e-6)


def test_resume_is_bit_exact(golden):
    whole = network(golden)
    train(whole, Ranger(whole.parameters(), lr=1e-2), golden, 20)

    first = network(golden)
    optimizer = Ranger(first.parameters(), lr=1e-2)
    train(first, optimizer, golden, 10)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))

    second = network(golden)
    second.load_state_dict(saved[0])
    optimizer = Ranger(second.parameters(), lr=5.0, k=2)  # loading the state replaces these values
    optimizer.load_state_dict(saved[1])
    train(second, optimizer, golden, 10)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def written_out(value, gradients, lr, alpha, k, beta1, beta2, eps, decay):
    """Compute Ranger's definition in float64, step by step."""
    slow, m, v = value.clone(), torch.zeros_like(value), torch.zeros_like(value)
    longest = 2 / (1 - beta2) - 1
    for t, g in enumerate(gradients, start=1):
        if g.ndim > 1:
            g = g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        value = value * (1 - lr * decay)
        if length > 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = (ratio * (1 - beta2**t)) ** 0.5 / (1 - beta1**t)
            value = value - lr * step * m / (v.sqrt() + eps)
        else:
            value = value - lr * m / (1 - beta1**t)
        if t % k == 0:
            slow = slow + alpha * (value - slow)
            value = slow.clone()
    return value


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"alpha": 0.8, "k": 3}, {"betas": (0.9, 0.99)}])
@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (4, 3), (5,)])
def test_definition(options, shape):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    start = p.detach().clone()
    optimizer = Ranger([p], lr=1e-2, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    beta1, beta2 = options.get("betas", (0.95, 0.999))
    expected = written_out(
        start, gradients, 1e-2, options.get("alpha", 0.5), options.get("k", 6), beta1, beta2, 1e-5,
        options.get("weight_decay", 0.0),
    )  # fmt: skip
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)

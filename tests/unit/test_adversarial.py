"""The adversarial objective against closed forms, and double backward of every operation that it uses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradgradcheck

from psp_lightning.data.augment import augment, warp
from psp_lightning.losses.adversarial import discriminator_loss, generator_loss, path_lengths, r1_penalty
from psp_lightning.models.discriminator import Discriminator, EqualisedConv, minibatch_std
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, modulated_convolution, upfirdn2d


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- closed forms


def test_losses_are_the_logs_of_sigmoids() -> None:
    real, fake = torch.tensor([0.3, -2.0, 4.0]).double(), torch.tensor([-1.0, 0.5, 3.0]).double()
    expected = -(1 - fake.sigmoid()).log().mean() - real.sigmoid().log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())


def test_losses_are_finite_for_extreme_scores() -> None:
    extreme = torch.tensor([-1e4, 1e4])
    assert generator_loss(extreme).item() == pytest.approx(5e3)
    assert discriminator_loss(extreme, extreme).item() == pytest.approx(1e4)


def test_r1_of_a_linear_discriminator_is_its_squared_norm() -> None:
    weight, images = double(3, 8, 8), double(4, 3, 8, 8)
    penalty = r1_penalty((images * weight).sum((1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum())
    (grad,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(grad, 2 * weight)


def test_r1_of_a_quadratic_discriminator() -> None:
    """D = a |x|^2 has the gradient 2 a x, so the penalty is the mean of 4 a^2 |x|^2."""
    a, images = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), double(5, 3, 4, 4)
    penalty = r1_penalty(a * images.square().sum((1, 2, 3)), images)
    energy = images.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, 4 * a**2 * energy)
    (grad,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(grad, 8 * a * energy)


def test_path_length_of_a_linear_generator() -> None:
    """For the image A w of one style, J^T y is A^T y; y is divided by the square root of the number of pixels."""
    side, style_dim, batch = 4, 6, 3
    matrix, w_plus = double(3 * side * side, style_dim), double(batch, 1, style_dim)
    images = (w_plus[:, 0] @ matrix.T).view(batch, 3, side, side)
    noise = torch.randn(batch, 3, side, side, dtype=torch.float64)
    expected = (noise.flatten(1) / side @ matrix).norm(dim=1)
    torch.testing.assert_close(path_lengths(images, w_plus, noise), expected)


def test_path_length_is_the_root_mean_square_over_styles() -> None:
    side, style_dim = 4, 5
    first, second = double(3 * side * side, style_dim), double(3 * side * side, style_dim)
    w_plus = double(2, 2, style_dim)
    images = (w_plus[:, 0] @ first.T + w_plus[:, 1] @ second.T).view(2, 3, side, side)
    noise = torch.randn(2, 3, side, side, dtype=torch.float64)
    y = noise.flatten(1) / side
    expected = (((y @ first).square().sum(1) + (y @ second).square().sum(1)) / 2).sqrt()
    lengths = path_lengths(images, w_plus, noise)
    torch.testing.assert_close(lengths, expected)
    (grad,) = torch.autograd.grad(lengths.sum(), first)
    assert grad.abs().sum() > 0, "the penalty does not reach the generator's weights"


# --- double backward


@pytest.mark.parametrize(
    ("up", "down", "pad"),
    [(1, 1, (0, 0)), (1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 2, (1, 2)), (1, 1, (-1, 2))],
)
def test_upfirdn2d(up: int, down: int, pad: tuple[int, int]) -> None:
    fir = fir_filter(gain=up**2).double()
    assert gradgradcheck(lambda x: upfirdn2d(x, fir, up, down, pad).square(), double(1, 2, 5, 5))


def test_fused_leaky_relu() -> None:
    assert gradgradcheck(lambda x, b: fused_leaky_relu(x, b).square(), (double(2, 3, 3, 3), double(3)))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("size", "up"), [(3, False), (3, True), (1, False)])
def test_modulated_conv2d(size: int, up: bool, demodulate: bool) -> None:
    fir = fir_filter(gain=4).double() if up else None
    inputs = double(2, 2, 4, 4), double(3, 2, size, size), double(2, 2)

    def call(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        x, factor = modulated_convolution(x, w, s, demodulate, up)
        return modconv_epilogue(x, fir, (1, 1), factor, negative_slope=1, gain=1)

    assert gradgradcheck(call, inputs)


def test_minibatch_std() -> None:
    assert gradgradcheck(lambda x: minibatch_std(x, 2), double(4, 2, 2, 2))


@pytest.mark.parametrize(("size", "down", "activation"), [(3, False, True), (3, True, True), (1, True, False)])
def test_equalised_conv(size: int, down: bool, activation: bool) -> None:
    layer = EqualisedConv(2, 3, size, down, activation).double()
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).square()

    values = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
    assert gradgradcheck(call, (double(1, 2, 4, 4), *values))


def affine() -> Tensor:
    matrix = torch.eye(3).repeat(2, 1, 1)
    matrix[:, :2] += 0.3 * torch.randn(2, 2, 3)
    return matrix


def test_warp() -> None:
    matrix = affine()
    assert gradgradcheck(lambda x: warp(x, matrix).square(), double(2, 1, 8, 8), fast_mode=True)


def test_warp_is_linear_and_its_gradient_is_its_transpose() -> None:
    matrix, x, y = affine(), double(2, 1, 8, 8), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    (transposed,) = torch.autograd.grad(warp(x, matrix), x, y)
    torch.testing.assert_close((transposed * x).sum(), (y * warp(x, matrix)).sum())


class Fixed:
    """A random source that returns the same numbers at every call."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, n: int, *shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=self.generator)

    def uniform(self, n: int, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=self.generator)


def test_augment() -> None:
    assert gradgradcheck(lambda x: augment(x, 1.0, Fixed()).square(), double(1, 3, 8, 8), fast_mode=True)


def test_r1_through_augmentation_and_discriminator() -> None:
    """Compare the penalty's gradient along a direction of the weights with a finite difference."""
    network = Discriminator(8, 32, 4).double()
    images = double(4, 3, 8, 8)

    def penalty() -> Tensor:
        return r1_penalty(network(augment(images, 0.8, Fixed())), images)

    weight = network.blocks[0].conv1.weight
    direction = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(penalty(), weight)
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(penalty().item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=1e-4)


def test_path_penalty_through_the_generator() -> None:
    network = Generator(8, style_dim=4, n_mapping=1, channel_multiplier=1, channel_base=32, max_channels=4).double()
    w_plus = double(2, network.n_styles, 4)
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = network.convs[0].conv.weight
    direction = torch.randn_like(weight)

    def penalty() -> Tensor:
        return (path_lengths(network.synthesis(w_plus), w_plus, noise) - 0.1).square().mean()

    (grad,) = torch.autograd.grad(penalty(), weight)
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(penalty().item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=1e-4)


def test_the_lookup_agrees_with_grid_sample() -> None:
    from psp_lightning.data.augment import _Lookup

    x, grid = double(2, 1, 6, 6), torch.rand(2, 5, 5, 2, dtype=torch.float64) * 2.4 - 1.2
    mine = _Lookup.apply(x, grid)
    theirs = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(mine, theirs)
    (a,) = torch.autograd.grad(mine.square().sum(), x)
    (b,) = torch.autograd.grad(theirs.square().sum(), x)
    torch.testing.assert_close(a, b)
    assert math.isfinite(a.sum().item())

"""Winograd's convolution against PyTorch's in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from psp_lightning.inference import frozen as frozen_form
from psp_lightning.inference.frozen import freeze_generator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops.cpu import frozen_conv, winograd
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv
from psp_lightning.ops.cpu.winograd import winograd_conv, winograd_pays, winograd_weight


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("numbers", [1, 3000, 1 << 22])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_and_its_adjoint(monkeypatch, numbers, size, channels_last):
    """The result does not depend on what is computed at a time: rows of tiles of one image, or several images."""
    monkeypatch.setattr(winograd, "NUMBERS", numbers)
    x, dy, weight = draw(3, 5, *size), draw(3, 7, *size, seed=1), draw(7, 5, 3, 3, seed=2)
    if channels_last:
        x, dy, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, weight))
    transformed = winograd_weight(weight)
    assert transformed.shape == (36, 7, 5) and transformed.dtype == torch.float32
    for found, expected in (
        (winograd_conv(x, transformed), F.conv2d(x.double(), weight.double(), padding=1)),
        (winograd_conv(dy, transformed, True), F.conv_transpose2d(dy.double(), weight.double(), padding=1)),
    ):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_rounding_errors_are_small_for_sums_over_many_channels():
    """With the points 0, +-1, +-2 the error would be 4.5e-6 here."""
    x, weight = draw(1, 512, 16, 16), draw(512, 512, 3, 3, seed=1)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = (winograd_conv(x, winograd_weight(weight)) - exact).square().mean().sqrt()
    assert error < 3e-6 * exact.square().mean().sqrt()


def test_transforms_in_one_dimension():
    """The three matrices compute a one-dimensional convolution."""
    a, g, b = winograd._matrices()
    d, taps = draw(6, dtype=torch.float64), draw(3, seed=1, dtype=torch.float64)
    expected = torch.stack([(d[i : i + 3] * taps).sum() for i in range(4)])
    torch.testing.assert_close(a.t() @ ((g @ taps) * (b @ d)), expected)


X, WEIGHT = (2, 256, 32, 32), (256, 256, 3, 3)


@pytest.mark.parametrize(
    "x, weight, pays",
    [
        (torch.empty(X), torch.empty(WEIGHT), True),
        (torch.empty(X, dtype=torch.bfloat16), torch.empty(WEIGHT, dtype=torch.bfloat16), False),
        (torch.empty(X, dtype=torch.float64), torch.empty(WEIGHT, dtype=torch.float64), False),
        (torch.empty(X, device="meta"), torch.empty(WEIGHT, device="meta"), False),
        (torch.empty(X), torch.empty(256, 256, 1, 1), False),
        (torch.empty(X), torch.empty(128, 256, 3, 3), False),
        (torch.empty(2, 256, 34, 32), torch.empty(WEIGHT), False),
        (torch.empty(1, 256, 16, 16), torch.empty(WEIGHT), False),
        (torch.empty(0, 256, 32, 32), torch.empty(WEIGHT), False),
    ],
)
def test_when_it_is_used(monkeypatch, x, weight, pays):
    monkeypatch.setattr(winograd, "has_onednn", lambda: True)
    assert winograd_pays(x, weight) is pays
    monkeypatch.setattr(winograd, "has_onednn", lambda: False)
    assert not winograd_pays(x, weight), "without oneDNN, PyTorch's products are slower"


@pytest.mark.parametrize("precision", ["high", "medium", None])
def test_it_is_not_used_if_products_may_have_lower_precision(monkeypatch, precision):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(winograd, "has_onednn", lambda: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", (lambda: precision) if precision else refuse)
    assert not winograd_pays(torch.empty(X), torch.empty(WEIGHT))


@pytest.mark.parametrize("second", [False, True])
def test_styled_layer(second):
    weight = draw(6, 5, 3, 3, seed=1)
    weight_sq_sum, noise, bias = weight.square().sum((2, 3)), draw(1, 1, 8, 8, seed=3), draw(6, seed=4)
    found = []
    for transformed in (winograd_weight(weight), None):
        x, style = draw(2, 5, 8, 8).requires_grad_(), draw(2, 5, seed=5).requires_grad_()
        y = frozen_styled_conv(x, style, weight, weight_sq_sum, noise, bias, winograd_weight=transformed)
        first = torch.autograd.grad(y.square().sum(), (x, style), create_graph=second)
        more = torch.autograd.grad(first[0].square().sum(), (x, style)) if second else ()
        many = torch.autograd.grad(
            frozen_styled_conv(x, style, weight, weight_sq_sum, noise, bias, winograd_weight=transformed),
            (x, style), draw(3, 2, 6, 8, 8, seed=6), is_grads_batched=True,
        )  # fmt: skip
        found.append([y, *first, *more, *many])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_a_frozen_generator_uses_it_if_it_is_faster(monkeypatch):
    """Layers with at least 256 channels at 32 px and above use it, forward and backward. Weights are prepared once,
    and again when new weights are loaded."""
    calls, prepared = [], []

    def convolve(x, *arguments, **options):
        calls.append(x.shape[2])
        return winograd_conv(x, *arguments, **options)

    def prepare(weight):
        prepared.append(weight)
        return winograd_weight(weight)

    monkeypatch.setattr(frozen_conv, "winograd_conv", convolve)
    monkeypatch.setattr(frozen_form, "winograd_weight", prepare)
    generator = freeze_generator(Generator.seeded(0, output_size=32, n_mapping=1, channels=[256] * 4))
    w = draw(1, 8, 512).requires_grad_()
    generator.synthesis(w).sum().backward()
    assert calls == [32, 32] and len(prepared) == 1
    generator.load_state_dict(generator.state_dict())
    with torch.no_grad():
        generator.synthesis(w)
    assert calls == [32, 32, 32] and len(prepared) == 2


def test_derivatives_in_forward_mode():
    """The Winograd products have no forward-mode derivatives, so the plain path is used."""
    generator = freeze_generator(Generator.seeded(0, output_size=32, n_mapping=1, channels=[256] * 4))
    w, tangent = draw(1, 8, 512), draw(1, 8, 512, seed=1)
    found = []
    for net, dtype in ((generator, torch.float32), (copy.deepcopy(generator).double(), torch.float64)):
        with torch.no_grad(), forward_ad.dual_level():
            image = net.synthesis(forward_ad.make_dual(w.to(dtype), tangent.to(dtype)))
            found.append(forward_ad.unpack_dual(image).tangent)
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()


def test_the_first_call_may_be_under_another_default_device():
    for function in (winograd._matrices, winograd._transforms):
        function.cache_clear()
    with torch.device("meta"):
        assert all(t.device.type == "cpu" for t in winograd._transforms(False))
    assert all(t.device.type == "cpu" for t in winograd._matrices())

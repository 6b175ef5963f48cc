"""The CPU operators for training against PyTorch's own, with first and second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psp_lightning.models.encoders import GradualStyleEncoder, MapToStyle, StridedConv
from psp_lightning.models.irse import PReLU
from psp_lightning.ops.cpu import product as product_module
from psp_lightning.ops.cpu import strided_conv as module
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv, frozen_to_rgb
from psp_lightning.ops.cpu.prelu import _PReLU, prelu
from psp_lightning.ops.cpu.product import product
from psp_lightning.ops.cpu.slices import slices
from psp_lightning.ops.cpu.strided_conv import _MatrixConv, strided_conv


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(function, inputs, second=False):
    """Return y, the derivatives of sum((y + 1)^2) and, if `second`, those of the first derivative's squared sum."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    first = torch.autograd.grad((y.float() + 1).square().sum(), inputs, create_graph=second)
    more = torch.autograd.grad(first[0].square().sum(), inputs[:2]) if second else ()
    return [y.detach(), *[t.detach() for t in first], *more]


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max(), float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def narrow(monkeypatch):
    """Use the matrix product even for few weights, a few pixels at a time."""
    monkeypatch.setattr(module, "WIDE", 1)
    monkeypatch.setattr(module, "PIXELS", 8)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 1), (5, 4), (8, 8), (9, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_strided_convolution_is_conv2d(narrow, size, channels_last, second):
    x, weight, bias = draw(3, 4, *size), draw(5, 4, 3, 3, seed=1), draw(5, seed=2)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    found = gradients(strided_conv, (x, weight, bias), second)
    assert_near(found, gradients(lambda *t: F.conv2d(*t, 2, 1), (x, weight, bias), second), 1e-5)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_strided_convolution_computes_only_the_requested_gradients(need):
    inputs = [draw(2, 4, 6, 6), draw(5, 4, 3, 3, seed=1), draw(5, seed=2)]
    found = []
    for function in (_MatrixConv.apply, lambda *t: F.conv2d(*t, 2, 1)):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(inputs, need, strict=True)]
        function(*leaves).square().sum().backward()
        found.append([t.grad for t in leaves])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_strided_convolution_under_autocast(narrow):
    x, weight, bias = draw(2, 64, 8, 8), draw(64, 64, 3, 3, seed=1) / 24, draw(64, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(strided_conv, (x, weight, bias))
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    exact = gradients(lambda *t: F.conv2d(*t, 2, 1), (x, weight, bias))
    assert_near([t.float() for t in found], exact, 0.02)


@pytest.mark.parametrize(
    "case", ["narrow", "no gradient", "frozen", "float64", "many pixels in bfloat16", "without oneDNN"]
)
def test_all_other_cases_use_pytorch(monkeypatch, case):
    """The matrix product is used only in cases in which it was measured to be faster."""
    monkeypatch.setattr(_MatrixConv, "apply", lambda *t: pytest.fail("the matrix product was used"))
    channels = 8 if case == "narrow" else 342
    layer = StridedConv(channels, channels)
    x = draw(2, channels, 34, 34) if "pixels" in case or "oneDNN" in case else draw(2, channels, 4, 4)
    if case == "no gradient":
        with torch.no_grad():
            layer(x)
        return
    if case == "frozen":
        layer.requires_grad_(False)
    if case == "without oneDNN":
        monkeypatch.setattr(module, "has_onednn", lambda: False)
    dtype = torch.float64 if case == "float64" else torch.bfloat16 if "bfloat16" in case else torch.float32
    layer.to(dtype)(x.to(dtype).requires_grad_())


def test_strided_convolution_of_inputs_that_only_pytorch_supports():
    layer = StridedConv(342, 342)
    assert layer(draw(342, 4, 4)).shape == (342, 2, 2), "an input without a batch"
    with pytest.raises(RuntimeError):
        layer(draw(1, 342, 4, 4).bfloat16())
    assert layer.to("meta")(torch.empty(1, 342, 4, 4, device="meta")).shape == (1, 342, 2, 2)


@pytest.mark.parametrize("name", ["prelu", "strided_conv", "layer", "to_rgb"])
def test_many_gradients_at_once(narrow, name):
    """They are computed with vmap, as in torch.autograd.functional.jacobian(vectorize=True)."""
    x, style, weight = draw(2, 3, 4, 4), draw(2, 3, seed=1), draw(3, 3, 3, 3, seed=2)
    energy, noise, bias = weight.square().sum((2, 3)), draw(1, 1, 4, 4, seed=3), draw(3, seed=4)
    last = x.contiguous(memory_format=torch.channels_last)
    function, inputs = {
        "prelu": (prelu, (x, bias)),
        "strided_conv": (strided_conv, (x, weight, bias)),
        "layer": (lambda x, s: frozen_styled_conv(x, s, weight, energy, noise, bias), (x, style)),
        "to_rgb": (lambda x, s: frozen_to_rgb(x, s, weight[:, :, :1, :1]), (last, style)),
    }[name]
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    many = draw(5, *y.shape, seed=5)
    found = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        for a, b in zip(found, torch.autograd.grad(y, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_heads_accept_hooks():
    """A hook receives the output of a convolution, and this output is not changed later."""
    layer, seen = MapToStyle(3, 4, 4), []
    layer.convs[0].register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    layer.convs[0].register_full_backward_hook(lambda *_: None)
    layer(draw(2, 3, 4, 4)).sum().backward()
    assert torch.equal(*seen[0])


def test_wide_heads_use_the_product(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "product", lambda *t: calls.append(t) or product(*t))
    StridedConv(342, 342)(draw(1, 342, 2, 2)).sum().backward()
    assert len(calls) == 2, "expected a forward product and one for the weights, because the source needs no gradient"


def test_a_strided_convolution_may_be_followed_by_an_in_place_operation(narrow):
    inputs = [draw(2, 4, 6, 6), draw(5, 4, 3, 3, seed=1), draw(5, seed=2)]
    found = gradients(lambda *t: F.leaky_relu_(strided_conv(*t), 0.1), inputs)
    assert_near(found, gradients(lambda *t: F.leaky_relu(F.conv2d(*t, 2, 1), 0.1), inputs), 1e-5)


@pytest.mark.parametrize(
    "plus",
    [draw(6), draw(12)[::2], draw(1).expand(6), draw(7, 6), draw(6, 7).t(), draw(1, 6), draw(7, 1), draw(1)[0]],
    ids=lambda t: f"{tuple(t.shape)}-{t.stride()}",
)
def test_product_and_sum_are_addmm(plus):
    a, b = draw(7, 5), draw(5, 6)
    torch.testing.assert_close(product(a, b, plus), torch.addmm(plus, a, b))


def test_product_and_sum_of_another_size():
    with pytest.raises(RuntimeError):
        product(draw(7, 5), draw(5, 6), draw(3, 6))


def test_heads_keep_their_keys():
    with torch.device("meta"):
        net = GradualStyleEncoder(10, 32, blocks=(1, 1, 1, 1), width=8)
    assert {"styles.9.convs.0.weight", "styles.9.convs.10.bias"} <= set(net.state_dict())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("size", [1 << 19, 30])
def test_prelu_equals_pytorchs(monkeypatch, channels_last, second, size):
    monkeypatch.setattr("psp_lightning.ops.cpu.slices.SLICE", size)
    x, weight = draw(2, 3, 5, 4), torch.tensor([0.25, -0.5, 1.5])
    x[0, 0, 0, 0] = 1 if second else 0  # at 0, PyTorch's second derivative is that of the other side
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = gradients(prelu, (x, weight), second)
    assert_near(found, gradients(F.prelu, (x, weight), second), 1e-5)
    assert not second or torch.autograd.gradcheck(prelu, (draw(2, 3, 2, 2).double().requires_grad_(), weight.double()))


def test_prelu_in_half_precision_sums_the_slope_gradient_in_float32():
    x, weight = draw(4, 2, 64, 64).bfloat16(), torch.full((2,), 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(prelu, (x, weight))
    exact = gradients(F.prelu, (x.float(), weight))
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    assert_near([t.float() for t in found], exact, 0.01)


def test_other_prelu_calls_use_pytorch(monkeypatch):
    monkeypatch.setattr(_PReLU, "apply", lambda *t: pytest.fail("the library's PReLU was used"))
    layer = PReLU(3)
    assert layer(draw(2, 3)).shape == (2, 3), "an input that is not an image"
    with torch.no_grad():
        layer(draw(2, 3, 4, 4))
    assert list(layer.state_dict()) == ["weight"] and isinstance(layer, nn.PReLU)


@pytest.mark.parametrize("shape", [((3, 7), (7, 5)), ((0, 7), (7, 5)), ((3, 7), (7, 0)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(shape, dtype, transposed):
    a, b = (draw(*s, dtype=torch.float64).to(dtype) for s in shape)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    torch.testing.assert_close(product(a, b), a @ b)


def test_product_is_differentiable_and_needs_no_onednn(monkeypatch):
    a, b = draw(3, 4).requires_grad_(), draw(4, 2, seed=1)
    product(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(3, 4))
    monkeypatch.setattr(product_module, "has_onednn", lambda: False)
    torch.testing.assert_close(product(a.detach(), b), a.detach() @ b)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 1, 1, 1), (2, 8, 1, 1 << 17), (0, 3, 4, 4)])
def test_slices_cover_the_tensor_once(shape):
    x = torch.zeros(shape)
    for rows in slices(x):
        x[rows] += 1
    assert (x == 1).all()

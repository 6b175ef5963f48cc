"""The ops against naive forms in double precision, with odd sizes, first and second derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, modulated_convolution, upfirdn2d
from psp_lightning.ops.upfirdn2d import adjoint_padding, upfirdn2d_ref


def rand(*shape, seed=0, grad=False):
    source = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=source, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (1, 2, 4, 0)], ids=str)
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
def test_no_pixels_but_padding(shape, up, down):
    x = torch.zeros(shape, requires_grad=True)
    y = upfirdn2d(x, fir_filter(), up, down, (9, 9))
    assert list(y.shape[2:]) == [(side * up + 14) // down + 1 for side in shape[2:]] and not y.any()
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize(
    "op",
    [
        lambda x, f: upfirdn2d(x, f, up=2, padding=(2, 1)),
        lambda x, f: upfirdn2d(x, f, down=2, padding=(1, 1)),
        lambda x, f: modconv_epilogue(x, f, (1, 1), x.new_ones(2, 3), bias=x.new_ones(3)),
    ],
    ids=["the running image", "down", "epilogue"],
)
def test_autocast_does_not_lower_a_filter(op):
    """As with the kernels, the result has the precision of the input, here the image that ToRGB layers sum."""
    x, fir = rand(2, 3, 8, 8).float(), fir_filter(gain=4)
    expected = op(x, fir)
    with torch.autocast("cpu", torch.bfloat16):
        found, low = op(x, fir), op(x.bfloat16(), fir)
    assert found.dtype == torch.float32 and torch.equal(found, expected) and low.dtype == torch.bfloat16


def naive_upfirdn2d(x, fir, up, down, padding):
    """Insert zeros, pad and apply the flipped filter, one output pixel at a time."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    before, after = padding
    wide = F.pad(wide, (max(before, 0), max(after, 0), max(before, 0), max(after, 0)))
    top, bottom = max(-before, 0), max(-after, 0)
    wide = wide[:, :, top : wide.shape[2] - bottom, top : wide.shape[3] - bottom]
    kh, kw = fir.shape
    rows = range(0, wide.shape[2] - kh + 1, down)
    columns = range(0, wide.shape[3] - kw + 1, down)
    out = x.new_zeros(b, c, len(rows), len(columns))
    for (i, r), (j, s) in itertools.product(enumerate(rows), enumerate(columns)):
        out[:, :, i, j] = (wide[:, :, r : r + kh, s : s + kw] * fir.flip(0, 1)).sum((2, 3))
    return out


def modulated_conv2d(x, weight, style, demodulate=True, up=False, fir=None):
    """Compute both steps of a modulated convolution, without noise, bias and activation."""
    x, factor = modulated_convolution(x, weight, style, demodulate, up)
    return modconv_epilogue(x, fir, (1, 1), factor, negative_slope=1, gain=1)


def naive_modulated_conv2d(x, weight, style, demodulate, up, fir):
    """Compute the paper's weight-side form, with one set of weights for each sample."""
    samples = []
    for one, s in zip(x, style, strict=True):
        w = weight * s[None, :, None, None]
        if demodulate:
            w = w * (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        if up:
            y = F.conv_transpose2d(one[None], w.transpose(0, 1), stride=2)
            y = naive_upfirdn2d(y, fir, 1, 1, (1, 1))
        else:
            y = F.conv2d(one[None], w, padding=w.shape[-1] // 2)
        samples.append(y)
    return torch.cat(samples)


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (1, 1), (3, 0), (-1, 2)])
@pytest.mark.parametrize("size", [(7, 9), (8, 8)])
def test_upfirdn2d_equals_naive(up, down, padding, size):
    x, fir = rand(2, 3, *size), rand(4, 4)  # asymmetric, to reveal a wrong flip
    actual = upfirdn2d(x, fir, up, down, padding)
    torch.testing.assert_close(actual, naive_upfirdn2d(x, fir, up, down, padding))


def test_upfirdn2d_non_contiguous_and_rectangular_kernel():
    x = rand(2, 9, 7, 3).permute(0, 3, 1, 2)
    assert not x.is_contiguous()
    for up in (1, 2):
        fir = rand(3, 5)
        torch.testing.assert_close(upfirdn2d(x, fir, up, 1, (2, 2)), naive_upfirdn2d(x, fir, up, 1, (2, 2)))


@pytest.mark.parametrize("up, down, padding", [(1, 1, (1, 1)), (2, 1, (2, 1)), (1, 2, (1, 1))])
def test_upfirdn2d_gradients(up, down, padding):
    x, fir = rand(1, 2, 5, 4, grad=True), rand(4, 4)
    assert gradcheck(lambda x: upfirdn2d(x, fir, up, down, padding), [x])
    assert gradgradcheck(lambda x: upfirdn2d(x, fir, up, down, padding), [x])


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
def test_upfirdn2d_flip_and_gain(up, down):
    x, fir = rand(2, 3, 7, 9), rand(4, 4)
    actual = upfirdn2d(x, fir, up, down, (2, 1), flip=True, gain=1.5)
    torch.testing.assert_close(actual, 1.5 * naive_upfirdn2d(x, fir.flip(0, 1), up, down, (2, 1)))


@pytest.mark.parametrize("up, down", [((1, 1), (1, 1)), ((2, 1), (1, 3)), ((3, 2), (2, 1)), ((1, 2), (2, 2))])
@pytest.mark.parametrize("padding", [(2, 1, 0, 3), (-1, 2, 3, -1)])
def test_adjoint_padding(up, down, padding):
    """`<upfirdn2d(x), y> = <x, upfirdn2d(y)>` with factors exchanged, the FIR filter flipped, and this padding."""
    x, fir = rand(1, 2, 8, 7), rand(3, 4)
    out = upfirdn2d_ref(x, fir, up, down, padding)
    y = rand(*out.shape, seed=1)
    back = adjoint_padding(x.shape[2:], out.shape[2:], up, down, padding, fir.shape)
    adjoint = upfirdn2d_ref(y, fir, down, up, back, flip=True)
    assert adjoint.shape == x.shape
    torch.testing.assert_close((out * y).sum(), (x * adjoint).sum())


def test_fir_kernel():
    fir = fir_filter(gain=4)
    assert fir.shape == (4, 4) and fir.sum().item() == pytest.approx(4)
    assert fir[1, 1].item() == pytest.approx(4 * 9 / 64)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 5, 3)])
def test_fused_leaky_relu(shape):
    x, bias = rand(*shape, grad=True), rand(6, grad=True)
    shifted = x + bias.view(1, -1, *[1] * (len(shape) - 2))
    expected = torch.where(shifted > 0, shifted, 0.2 * shifted) * 2**0.5
    torch.testing.assert_close(fused_leaky_relu(x, bias), expected)
    torch.testing.assert_close(fused_leaky_relu(x), torch.where(x > 0, x, 0.2 * x) * 2**0.5)
    assert gradcheck(fused_leaky_relu, [x, bias])
    assert gradgradcheck(fused_leaky_relu, [x, bias])


def test_fused_leaky_relu_clamp():
    x = torch.tensor([[-20.0, -1.0, 1.0, 3.0]])
    torch.testing.assert_close(fused_leaky_relu(x, scale=2, clamp=4), torch.tensor([[-4.0, -0.4, 2.0, 4.0]]))


@pytest.mark.parametrize("up", [True, False])
def test_modconv_epilogue_equals_its_steps(up):
    x, fir = rand(2, 3, 6, 5), rand(4, 4)
    side = (7, 6) if up else (6, 5)
    demod, noise, strength, bias = rand(2, 3), rand(2, 1, *side), rand(1), rand(3)
    t = naive_upfirdn2d(x, fir, 1, 1, (2, 2)) if up else x
    u = t * demod[:, :, None, None] + strength * noise + bias[None, :, None, None]
    expected = (torch.where(u > 0, u, 0.1 * u) * 3).clamp(-2, 2)
    arguments = (fir, (2, 2)) if up else (None, (0, 0))
    torch.testing.assert_close(modconv_epilogue(x, *arguments, demod, noise, strength, bias, 0.1, 3, 2), expected)


def test_modconv_epilogue_needs_the_strength_of_its_noise():
    with pytest.raises(ValueError, match="strength"):
        modconv_epilogue(rand(1, 2, 4, 4), noise=rand(1, 1, 4, 4))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up, k", [(True, 3), (False, 3), (False, 1)])
def test_modulated_conv2d_equals_weight_side_form(demodulate, up, k):
    x, weight, style = rand(3, 4, 5, 7), rand(6, 4, k, k), rand(3, 4)
    fir = fir_filter(gain=4).double() if up else None
    actual = modulated_conv2d(x, weight, style, demodulate, up, fir)
    assert actual.shape == ((3, 6, 10, 14) if up else (3, 6, 5, 7))
    torch.testing.assert_close(actual, naive_modulated_conv2d(x, weight, style, demodulate, up, fir))


@pytest.mark.parametrize("up", [True, False])
def test_modulated_conv2d_gradients(up):
    inputs = [rand(2, 3, 4, 3, grad=True), rand(2, 3, 3, 3, grad=True), rand(2, 3, grad=True)]
    fir = fir_filter(gain=4).double() if up else None
    assert gradcheck(lambda x, w, s: modulated_conv2d(x, w, s, True, up, fir), inputs)
    assert gradgradcheck(lambda x, w, s: modulated_conv2d(x, w, s, True, up, fir), inputs)


def test_modulated_conv2d_treats_samples_independently():
    x, weight, style = rand(3, 4, 5, 5), rand(6, 4, 3, 3), rand(3, 4)
    whole = modulated_conv2d(x, weight, style)
    single = torch.cat([modulated_conv2d(x[i : i + 1], weight, style[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, single)


def test_channels_last_gives_the_same():
    x, weight, style = rand(2, 4, 6, 6), rand(6, 4, 3, 3), rand(2, 4)
    fir = fir_filter(gain=4).double()
    last = modulated_conv2d(x.contiguous(memory_format=torch.channels_last), weight, style, True, True, fir)
    torch.testing.assert_close(last, modulated_conv2d(x, weight, style, True, True, fir))

"""The kernels against plain PyTorch in float64: forward, backward, double backward, all dtypes and memory layouts.

They run on a GPU if there is one, and always on the CPU, thread by thread.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from psp_lightning.ops import fir_filter, fused_leaky_relu, modconv_epilogue, upfirdn2d
from psp_lightning.ops.bias_act import bias_act_ref
from psp_lightning.ops.check import BOUNDS, SIZES, away_from, relative_error, run_checks
from psp_lightning.ops.cuda import launch as _cuda
from psp_lightning.ops.epilogue import epilogue_ref
from psp_lightning.ops.upfirdn2d import upfirdn2d_ref

DTYPES = tuple(BOUNDS)
FORMATS = (torch.contiguous_format, torch.channels_last)
FIR = fir_filter((1, 3, 2, 1), gain=4)  # asymmetric, to reveal a wrong flip
FULL = torch.tensor([[1.0, 2, 0, -1], [0, 3, 1, 1], [2, 0, 0, 1], [1, 1, -2, 0]]) / 4
both_orders = pytest.mark.parametrize("order", FORMATS, ids=["planes", "last"])
all_types = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Draw:
    """A source of new leaf tensors on the device, drawn from a fixed random stream and rounded to the dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, order: torch.memory_format, seed: int = 0) -> None:
        self.source = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.order = device, dtype, order

    def __call__(self, *shape: int, small: bool = False) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        x = torch.randn(*shape, generator=self.source, dtype=torch.float64).to(wide if small else self.dtype)
        if x.ndim == 4 and not small:
            x = x.contiguous(memory_format=self.order)
        return x.to(self.device).requires_grad_()


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]


def poison(device: torch.device) -> None:
    """Fill the memory that the allocator returns next with NaN."""
    if device.type == "cuda":
        kept = [torch.full((n,), float("nan"), device=device) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22)]
        del kept


def compare(
    function,
    reference,
    tensors: list[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
    second: bool = True,
    clamp: float | None = None,
) -> None:
    """Compare values and first and second derivatives of `function` with those of `reference` in float64."""
    exact = double(tensors)
    poison(device)
    y, expected = function(*tensors), reference(*exact)
    assert y.shape == expected.shape and y.dtype == dtype, (y.shape, expected.shape, y.dtype)
    assert relative_error(y, expected) <= BOUNDS[dtype], "forward"
    given = [t for t in tensors if t is not None]
    given_exact = [t for t in exact if t is not None]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if clamp is not None:
        dy = away_from(clamp, expected, dy)
    dy_here = dy.to(device, dtype)
    poison(device)
    grads = torch.autograd.grad(y, given, dy_here, retain_graph=True)
    expected_grads = torch.autograd.grad(expected, given_exact, dy_here.double().cpu(), create_graph=True)
    for i, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        assert relative_error(grad, expected_grad, 1.0) <= 4 * BOUNDS[dtype], f"gradient {i}"
    if not second:
        return
    composed = torch.autograd.grad(y, given, dy_here, create_graph=True)
    for i, (grad, expected_grad) in enumerate(zip(composed, expected_grads, strict=True)):
        assert relative_error(grad, expected_grad, 1.0) <= 4 * BOUNDS[dtype], f"gradient {i} with its graph"
    weights = [torch.randn(g.shape, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(composed)]
    penalty = sum((g * w.to(g)).sum() for g, w in zip(composed, weights, strict=True))
    expected_penalty = sum((g * w.to(g)).sum() for g, w in zip(expected_grads, weights, strict=True))
    found, wanted = (
        # a function that is linear in all inputs has no second derivative and may have no graph for it
        torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        for value, leaves in ((penalty, given), (expected_penalty, given_exact))
    )
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        other = torch.zeros_like(given_exact[i]) if other is None else other
        one = torch.zeros_like(given[i]) if one is None else one
        assert relative_error(one, other, 1.0) <= 8 * BOUNDS[dtype], f"second derivative {i}"


@all_types
@both_orders
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 16, 8, 8), (3, 40, 1, 1), (1, 264, 3, 2)], ids=str)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_bias_act(device, dtype, order, shape, clamp):
    draw = Draw(device, dtype, order)
    compare(
        lambda x, b: fused_leaky_relu(x, b.to(x.dtype), 0.2, 1.3, clamp),
        lambda x, b: bias_act_ref(x, b, 0.2, 1.3, clamp),
        [draw(*shape), draw(shape[1])],
        dtype,
        device,
        clamp=clamp,
    )


@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 3), (2, 3, 2, 2, 2)], ids=str)
def test_bias_act_of_other_ranks(device, shape):
    draw = Draw(device, torch.float32, torch.contiguous_format)
    compare(
        fused_leaky_relu,
        lambda x, b: bias_act_ref(x, b, 0.2, 2**0.5),
        [draw(*shape), draw(shape[1])],
        torch.float32,
        device,
    )


SETTINGS = [(1, 1, (1, 1)), (1, 1, (2, 1)), (1, 1, (-1, 3)), (2, 1, (2, 1)), (2, 1, (1, 2)), (1, 2, (1, 1)),
            (2, 2, (3, 0)), (3, 2, (-2, 4)), (1, 3, (0, 5)), (1, 1, (7, 9))]  # fmt: skip


def compare_upfirdn2d(device, dtype, order, setting, separable, shape):
    up, down, padding = setting
    draw = Draw(device, dtype, order)
    fir = fir_filter((1, 3, 2, 1)) if separable else FULL
    flip, gain = not separable, 1.5
    compare(
        lambda x: upfirdn2d(x, fir.to(device), up, down, padding, flip, gain),
        lambda x: upfirdn2d_ref(x, fir.double(), (up, up), (down, down), (*padding, *padding), flip, gain),
        [draw(*shape)],
        dtype,
        device,
    )


@both_orders
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("separable", [True, False], ids=["separable", "full"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 16, 16, 13)], ids=str)
def test_upfirdn2d(device, order, setting, separable, shape):
    compare_upfirdn2d(device, torch.float32, order, setting, separable, shape)


@all_types
@both_orders
@pytest.mark.parametrize("setting", SETTINGS[:5:2], ids=str)
def test_upfirdn2d_of_all_types(device, dtype, order, setting):
    for separable in (True, False):
        compare_upfirdn2d(device, dtype, order, setting, separable, (2, 16, 9, 7))


@both_orders
@pytest.mark.parametrize("taps", [(1, 1), (3, 5), (6, 6), (12, 12), (1, 4), (24, 24)], ids=str)
@pytest.mark.parametrize("separable", [True, False], ids=["separable", "full"])
def test_upfirdn2d_of_other_filters(device, order, taps, separable):
    draw = Draw(device, torch.float32, order)
    if separable:
        fir = torch.outer(*(torch.rand(n, generator=draw.source) + 0.1 for n in taps))
    else:
        fir = torch.randn(*taps, generator=draw.source)
    for up, down, flip in ((1, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)):
        padding = (max(taps) // 2, max(taps) - max(taps) // 2)
        compare(
            lambda x, a=(up, down, padding, flip): upfirdn2d(x, fir.to(device), *a),
            lambda x, u=up, d=down, p=(*padding, *padding), f=flip: upfirdn2d_ref(
                x, fir.double(), (u, u), (d, d), p, f
            ),
            [draw(2, 4, 11, 10)],
            torch.float32,
            device,
        )


@both_orders
@pytest.mark.parametrize("fir, padding", [(None, (0, 0)), (FIR, (1, 1)), (FIR, (2, 0)), (FULL, (1, 2))])
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (3, 5, 7, 6), (1, 1, 17, 5), (2, 24, 5, 8)], ids=str)
@pytest.mark.parametrize("each, clamp", [(True, None), (False, 1.0)], ids=["noise of each", "one noise, bounded"])
def test_epilogue(device, order, fir, padding, shape, each, clamp):
    compare_epilogue(device, torch.float32, order, fir, padding, shape, each, clamp)


@all_types
@both_orders
@pytest.mark.parametrize("shape", [(2, 16, 9, 8), (3, 5, 7, 7)], ids=str)
def test_epilogue_of_all_types(device, dtype, order, shape):
    for fir in (None, FIR, FULL):
        # A filter that is not separable takes a separate pass, whose result is rounded. A clamp would make this error
        # large relative to the result.
        compare_epilogue(device, dtype, order, fir, (2, 1), shape, True, None if fir is FULL else 1.0)


def compare_epilogue(device, dtype, order, fir, padding, shape, each, clamp):
    draw = Draw(device, dtype, order)
    b, c, h, w = shape
    if fir is not None:
        h, w = h + sum(padding) - 3, w + sum(padding) - 3
    here = None if fir is None else fir.to(device)

    def reference(x, demod, noise, strength, bias):
        if fir is not None:
            x = upfirdn2d_ref(x, fir.double(), padding=(*padding, *padding))
        return epilogue_ref(x, demod, noise, strength, bias, 0.2, 1.4, clamp)

    noise = draw(b if each else 1, 1, h, w, small=True)
    fixed = noise.detach()
    compare(
        lambda x, d, s, e: modconv_epilogue(x, here, padding, d, fixed, s, e, 0.2, 1.4, clamp),
        lambda x, d, s, e: reference(x, d, fixed.double().cpu(), s, e),
        [draw(*shape), draw(b, c, small=True), draw(1, small=True), draw(c, small=True)],
        dtype,
        device,
        clamp=clamp,
    )


@both_orders
@pytest.mark.parametrize("given", [(), ("demod",), ("noise", "strength"), ("bias",)], ids=str)
@pytest.mark.parametrize("fir", [None, FIR], ids=["plain", "filter"])
def test_epilogue_of_some_parts(device, order, given, fir):
    draw = Draw(device, torch.float32, order)
    shapes = {"demod": (2, 8), "noise": (2, 1, 6, 5), "strength": (1,), "bias": (8,)}
    parts = {name: draw(*shapes[name], small=True) for name in given}
    x = draw(2, 8, 6, 5) if fir is None else draw(2, 8, 7, 6)
    names = ("demod", "noise", "strength", "bias")

    def reference(x, *rest):
        if fir is not None:
            x = upfirdn2d_ref(x, fir.double(), padding=(1, 1, 1, 1))
        named = dict(zip(given, rest, strict=True))
        return epilogue_ref(x, *(named.get(name) for name in names), 1.0, 1.0, None)

    compare(
        lambda x, *rest: modconv_epilogue(
            x, None if fir is None else fir.to(device), (1, 1), **dict(zip(given, rest, strict=True)),
            negative_slope=1, gain=1,
        ),
        reference,
        [x, *parts.values()],
        torch.float32,
        device,
    )  # fmt: skip


@both_orders
def test_sums_over_many_chunks(device, order):
    """Several blocks share a map, and the last chunk is not full."""
    for dtype, side in ((torch.float32, 211), (torch.float16, 210)):
        draw = Draw(device, dtype, order)
        noise = draw(1, 1, side, side, small=True).detach()
        compare(
            lambda x, d, s, b: modconv_epilogue(x, None, (0, 0), d, noise, s, b),  # noqa: B023
            lambda x, d, s, b: epilogue_ref(x, d, noise.double().cpu(), s, b, 0.2, 2**0.5, None),  # noqa: B023
            [draw(2, 3, side, side), draw(2, 3, small=True), draw(1, small=True), draw(3, small=True)],
            dtype,
            device,
            second=False,
        )


def test_gradcheck(device):
    draw = Draw(device, torch.float64, torch.channels_last)
    noise, fir = draw(1, 1, 4, 5, small=True), FIR.to(device)
    inputs = (draw(2, 3, 5, 6), draw(2, 3), noise, draw(1), draw(3))

    def function(x, d, n, s, b):
        return modconv_epilogue(x, fir, (1, 1), d, n, s, b, clamp=3.0)

    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)
    for up, down, padding in SETTINGS:

        def filtered(x, a=(up, down, padding)):
            return upfirdn2d(x, FULL.to(device).double(), *a)

        x = (draw(1, 2, 5, 4),)
        assert gradcheck(filtered, x) and gradgradcheck(filtered, x)
    inputs = (draw(2, 3, 3, 2), draw(3))
    assert gradcheck(fused_leaky_relu, inputs) and gradgradcheck(fused_leaky_relu, inputs)


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (2, 0, 6, 6)], ids=str)
def test_empty_batch(device, shape):
    b, c, h, w = shape
    x = torch.zeros(shape, device=device, requires_grad=True)
    demod, bias = torch.ones(b, c, device=device, requires_grad=True), torch.ones(c, device=device, requires_grad=True)
    for fir in (None, FIR.to(device)):
        y = modconv_epilogue(x, fir, (2, 1), demod, bias=bias)
        assert y.shape == shape
        y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert bias.grad is not None and not bias.grad.any()
    assert upfirdn2d(x, FIR.to(device), 2, 1, (2, 1)).shape == (b, c, 12, 12)
    assert fused_leaky_relu(x, bias).shape == shape


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (2, 8, 3, 0)], ids=str)
def test_no_pixels_but_padding(device, shape):
    """The result is zero, or what the epilogue makes of zero."""
    b, c, h, w = shape
    x, bias = torch.zeros(shape, device=device, requires_grad=True), torch.ones(c, device=device)
    for fir in (FIR, FULL, torch.ones(6, 6)):
        taps = len(fir)
        for up, down in ((1, 1), (2, 1), (1, 2)):
            y = upfirdn2d(x, fir.to(device), up, down, (9, 9))
            size = [(side * up + 18 - taps) // down + 1 for side in (h, w)]
            assert y.shape == (b, c, *size) and not y.any()
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert grad.shape == shape
        y = modconv_epilogue(x, fir.to(device), (9, 9), bias=bias, gain=3.0)
        assert y.shape == (b, c, h + 19 - taps, w + 19 - taps) and (y == 3).all()


def test_inputs_that_are_not_dense(device):
    """Test slices, transposed and expanded tensors, also with addresses that are not multiples of 16 bytes."""
    base = torch.randn(2, 9, 10, 13, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(1)).to(device)
    views = [base[:, 1:, 1:, 1:], base[:, :8].transpose(2, 3), base[:1, :8].expand(2, -1, -1, -1),
             base.flatten()[1 : 1 + 2 * 8 * 12 * 4].view(2, 8, 12, 4)]  # fmt: skip
    for x in views:
        assert relative_error(fused_leaky_relu(x, bias), bias_act_ref(x.double(), bias.double(), 0.2, 2**0.5)) < 1e-6
        for up in (1, 2):
            expected = upfirdn2d_ref(x.double(), FIR.double().to(device), (up, up), (1, 1), (1, 2, 1, 2))
            assert relative_error(upfirdn2d(x, FIR.to(device), up, 1, (1, 2)), expected) < 1e-6


def test_nan_is_propagated(device):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]], device=device)
    y = fused_leaky_relu(x, clamp=2.0).cpu()
    assert y.isnan().tolist() == [[True, False, False, False]] and y[0, 1:].tolist() == [2.0, -2.0, 0.0]


def test_a_changed_filter_is_analysed_again(device):
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(device)
    fir = FIR.clone().to(device)
    upfirdn2d(x, fir, padding=(1, 2))
    fir.copy_(FULL)
    expected = upfirdn2d_ref(x.double(), FULL.double().to(device), padding=(1, 2, 1, 2))
    assert relative_error(upfirdn2d(x, fir, padding=(1, 2)), expected) < 1e-6


def sizes(device):
    return SIZES if device.type == "cuda" else ((2, 12, 11, 9), (2, 16, 16, 16))  # thread by thread is slow


def test_the_check_of_psp_doctor_passes(device):
    results = list(run_checks(device, sizes(device)))
    assert len(results) > 100
    wrong = [f"{result.name}: {result.error:.1e} > {result.bound:.1e}" for result in results if not result.good]
    assert not wrong, "\n".join(wrong)


def test_the_check_finds_a_wrong_kernel(device, monkeypatch):
    """The check of psp-doctor reports a kernel that omits the bias."""
    run = _cuda.epilogue
    monkeypatch.setattr(_cuda, "epilogue", lambda *a: run(*a[:7], None, *a[8:]))
    wrong = {result.name.split()[0] for result in run_checks(device, sizes(device)) if not result.good}
    assert wrong == {"bias_act", "modconv_epilogue"}

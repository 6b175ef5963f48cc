"""Compare every kernel with plain PyTorch in float64, on random inputs; `psp-doctor ops` runs this on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psp_lightning.ops.bias_act import bias_act_ref, fused_leaky_relu
from psp_lightning.ops.epilogue import epilogue_ref, modconv_epilogue
from psp_lightning.ops.upfirdn2d import fir_filter, upfirdn2d, upfirdn2d_ref

# Largest error relative to the largest absolute value: rounding of products, sums and results. Gradients may have twice
# the error, because they are rounded twice.
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 16e-3}

BOUND = 2.5  # clamp in the cases below
SIZES = ((2, 28, 133, 131), (2, 16, 256, 256))  # with and without packs of neighbours, and with several blocks per map


@dataclass(frozen=True)
class Result:
    """One comparison: the largest error of values and gradients, and its bound."""

    name: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        """Return whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def relative_error(found: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """Return the largest difference relative to the largest expected absolute value; infinite for non-finite values.

    `floor` is a lower bound of that value, for sums whose terms cancel.
    """
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=floor))


def away_from(bound: float, y: Tensor, dy: Tensor) -> Tensor:
    """Return `dy`, set to 0 where `y` is so close to a kink (0 or the clamp) that rounding decides its side."""
    size, margin = y.detach().abs(), 0.04 * bound
    return torch.where((size < margin) | ((size - bound).abs() < margin), torch.zeros_like(dy), dy)


def run_checks(device: torch.device, sizes: Sequence[tuple[int, int, int, int]] = SIZES) -> Iterator[Result]:
    """Compare values and gradients of every op on `device`, for each dtype and memory layout."""
    seed = int(torch.randint(2**31, ()))
    for dtype in BOUNDS:
        for order, suffix in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels_last")):
            label = f"{str(dtype).removeprefix('torch.')} {suffix}"
            for name, inputs, op, reference in _cases(seed, dtype, sizes):
                yield _compare(f"{name} {label}", inputs, op, reference, device, dtype, order)


Function = Callable[..., Tensor]


def _cases(
    seed: int, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int, int]]
) -> Iterator[tuple[str, list[Tensor], Function, Function]]:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    separable, full = fir_filter((1, 3, 2, 1), gain=4), draw(4, 4).float() / 4
    for size in sizes:
        n, c, h, w = size
        shape = "x".join(map(str, size))
        yield (
            f"bias_act {shape}",
            [draw(*size), draw(c).to(dtype)],
            lambda x, b: fused_leaky_relu(x, b.to(x.dtype), clamp=BOUND),
            lambda x, b: bias_act_ref(x, b, 0.2, 2**0.5, BOUND),
        )
        for up, down, padding in ((1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (3, 2, (-1, 4))):
            for kind, fir in (("separable", separable), ("full", full)):
                arguments = ((up, up), (down, down), (*padding, *padding))
                yield (
                    f"upfirdn2d {kind} up={up} down={down} {shape}",
                    [draw(*size)],
                    lambda x, f=fir, a=(up, down, padding): upfirdn2d(x, f.to(x.device), *a),
                    lambda x, f=fir, a=arguments: upfirdn2d_ref(x, f.to(x), *a),
                )
        filters: dict[str, Tensor | None] = {"": None, "separable ": separable, "full ": full}
        for kind, chosen in filters.items():
            noise = draw(1, 1, h, w).float()

            def op(x: Tensor, d: Tensor, s: Tensor, b: Tensor, f: Tensor | None = chosen, e: Tensor = noise) -> Tensor:
                f = None if f is None else f.to(x.device)
                return modconv_epilogue(x, f, (1, 1), d, e.to(x.device), s, b, clamp=BOUND)

            def reference(
                x: Tensor, d: Tensor, s: Tensor, b: Tensor, f: Tensor | None = chosen, e: Tensor = noise
            ) -> Tensor:
                x = x if f is None else upfirdn2d_ref(x, f.to(x), padding=(1, 1, 1, 1))
                return epilogue_ref(x, d, e.to(x), s, b, 0.2, 2**0.5, BOUND)

            small = [draw(*dims).to(wide) for dims in ((n, c), (1,), (c,))]
            more = 0 if chosen is None else 1  # the filter and its padding take one row and column
            yield f"modconv_epilogue {kind}{shape}", [draw(n, c, h + more, w + more), *small], op, reference


def _compare(
    name: str, inputs: list[Tensor], op: Function, reference: Function, device: torch.device, dtype: torch.dtype,
    order: torch.memory_format,
) -> Result:  # fmt: skip
    x = inputs[0].to(dtype).contiguous(memory_format=order)  # both get the rounded input
    here = [t.to(device).requires_grad_() for t in (x, *inputs[1:])]
    exact = [t.double().requires_grad_() for t in (x, *inputs[1:])]
    y, expected = op(*here), reference(*exact)
    dy = away_from(BOUND, expected, torch.randn(expected.shape, dtype=torch.float64)).to(dtype)
    grads = torch.autograd.grad(y, here, dy.to(device))
    expected_grads = torch.autograd.grad(expected, exact, dy.double())
    # A sum of many terms may cancel; without cancellation its size is the square root of their number.
    terms = [max(1.0, math.sqrt(y.numel() / g.numel())) for g in grads]
    errors = [relative_error(g, e, n) / 2 for g, e, n in zip(grads, expected_grads, terms, strict=True)]
    return Result(name, max(relative_error(y, expected), *errors), BOUNDS[dtype])

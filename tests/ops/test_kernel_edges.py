"""The kernels at the edges of maps, strips and packs: nothing outside of a tensor is used or written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psp_lightning.ops import fir_filter, modconv_epilogue, upfirdn2d
from psp_lightning.ops.check import BOUNDS, relative_error
from psp_lightning.ops.cuda import launch
from psp_lightning.ops.epilogue import epilogue_ref
from psp_lightning.ops.upfirdn2d import upfirdn2d_ref

GUARD = 64  # elements before and after a tensor
FIR = fir_filter((1, 3, 2, 1), gain=4)
# one row, one column, one pixel; more lanes than threads; a strip of 16 rows that is full, has one row or misses one;
# the same for strips of four rows; channels that do not fill a pack
SHAPES = [(1, 8, 1, 1), (2, 8, 1, 300), (1, 16, 65, 1), (1, 3, 64, 2), (1, 2, 79, 3), (1, 12, 5, 259), (2, 24, 7, 33)]


class Memory:
    """Tensors with NaN before and after them, `shift` elements after an address that is a multiple of 16 bytes."""

    def __init__(self, device: torch.device, shift: int) -> None:
        self.device, self.shift = device, shift
        self.made: list[tuple[Tensor, Tensor]] = []  # the whole memory, its part

    def empty(self, like: Tensor, shape: list[int]) -> Tensor:
        """Return a tensor as `launch.empty` does."""
        shape = list(shape)
        last = launch.memory_format(like) == torch.channels_last
        stride = torch.empty(shape, device="meta", memory_format=torch.channels_last if last else None).stride()
        count = torch.Size(shape).numel()
        whole = torch.full((count + 2 * GUARD,), float("nan"), dtype=like.dtype, device=self.device)
        part = whole.as_strided(shape, stride, GUARD + self.shift)
        self.made.append((whole, part))
        return part

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(x, list(x.shape)).copy_(x).requires_grad_()

    def assert_kept(self) -> None:
        for whole, part in self.made:
            start = GUARD + self.shift
            assert whole[:start].isnan().all() and whole[start + part.numel() :].isnan().all(), part.shape


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_outside_is_touched(device, dtype, order, shift, monkeypatch):
    memory = Memory(device, shift)
    monkeypatch.setattr(launch, "empty", memory.empty)
    source = torch.Generator().manual_seed(0)
    fir = FIR.to(device)

    def check(function, reference, *inputs):
        here = [memory.copy(t.to(device)) for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        y, expected = function(*here), reference(*exact)
        dy = torch.randn(expected.shape, generator=source, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(y, here, memory.copy(dy.to(device)).detach())
        wanted = torch.autograd.grad(expected, exact, dy.double())
        assert relative_error(y, expected) <= BOUNDS[dtype]
        for found, right in zip(grads, wanted, strict=True):
            terms = max(1.0, (y.numel() / found.numel()) ** 0.5)  # a sum of many may cancel
            assert relative_error(found, right, terms) <= 4 * BOUNDS[dtype]
        memory.assert_kept()

    for shape in SHAPES:
        b, c, h, w = shape
        x = torch.randn(shape, generator=source).to(dtype).contiguous(memory_format=order)
        small = [torch.randn(size, generator=source) for size in ((b, c), (1,), (c,))]
        for padding in (None, (2, 1), (7, 9), (-1, 5)):
            size = [side if padding is None else side + sum(padding) - 3 for side in (h, w)]
            noise = torch.randn(b, 1, *size, generator=source)
            here = memory.copy(noise.to(device)).detach()
            both = () if padding is None else (*padding, *padding)

            def reference(x, d, s, e, both=both, noise=noise):
                x = upfirdn2d_ref(x, FIR.double(), padding=both) if both else x
                return epilogue_ref(x, d, noise.double(), s, e, 0.2, 1.4, None)

            def function(x, d, s, e, padding=padding, noise=here):
                return modconv_epilogue(x, fir if padding else None, padding or (0, 0), d, noise, s, e, gain=1.4)

            check(function, reference, x, *small)
        for up, down, padding in ((2, 1, (2, 1)), (1, 2, (2, 2)), (3, 2, (-1, 4))):
            check(
                lambda x, a=(up, down, padding): upfirdn2d(x, fir, *a),
                lambda x, u=up, d=down, p=padding: upfirdn2d_ref(x, FIR.double(), (u, u), (d, d), (*p, *p)),
                x,
            )

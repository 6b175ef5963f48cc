"""What the compiler makes of the kernels for sm_90, counted without a GPU: a slower form shows here."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import Kernel, cuobjdump, kernels, table
from psp_lightning.ops.cuda import toolchain

pytestmark = [
    pytest.mark.slow,  # a compilation, shared by all tests
    pytest.mark.skipif(
        bool(toolchain.missing()) or cuobjdump() is None, reason="needs nvcc and cuobjdump, which triton has"
    ),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Kernel]:
    return kernels("sm_90")


def packed(compiled: dict[str, Kernel]) -> list[Kernel]:
    """The kernels that work on packs of 16 bytes."""
    return [kernel for kernel in compiled.values() if kernel.pack > 1]


def test_every_kernel_is_found(compiled):
    assert len(compiled) == 4 * (4 + 4 + 3 + 3), table(compiled)  # types; pack or one, and the order of memory


def test_a_pack_is_one_store(compiled):
    """128 bits. Before, a pack of the epilogue was four stores of 32 bits."""
    for kernel in packed(compiled):
        allowed = {128} | ({64 if "float64" in kernel.name else 32} if "backward" in kernel.name else set())  # the sums
        assert set(kernel.stores) <= allowed and kernel.stores[128] >= 1, (kernel.name, kernel.stores)


def test_registers_suffice(compiled):
    """A few accesses to local memory are the price of a third block per multiprocessor."""
    assert not {kernel.name: kernel.local for kernel in compiled.values() if kernel.local > 4}


# instructions per output of a loop, a tenth above what was counted: docs/kernels.md
@pytest.mark.parametrize(
    "name, most",
    [
        ("epilogue<bfloat16, 8, last>", 16),
        ("epilogue<float32, 4, last>", 21),
        ("epilogue_backward<bfloat16, 8, last>", 24),
        ("fir_epilogue<bfloat16, 8, last>", 37),
        ("upfirdn<bfloat16, 8, last>", 39),
        ("upfirdn<float32, 1, planes>", 250),
    ],
)
def test_instructions_per_output(name, most, compiled):
    assert compiled[name].per_output <= most, table(compiled)


def test_no_branch_a_tap(compiled):
    """A group of four rows has sixteen taps and stores four times; each store is behind a branch."""
    for kernel in compiled.values():
        if kernel.name.startswith("fir_epilogue"):
            assert kernel.branches <= 12, (kernel.name, kernel.branches)


def test_blocks_that_fit_a_multiprocessor(compiled):
    assert min(kernel.blocks for kernel in compiled.values()) >= 3, table(compiled)

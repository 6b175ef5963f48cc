"""Count instructions, memory accesses and registers in the machine code of the CUDA kernels, without a GPU.

    python -m benchmarks.machine_code [sm_90]

It needs nvcc, and cuobjdump, which the toolkit and the triton package have.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from psp_lightning.ops.cuda import toolchain

THREADS = 256  # per block
WITHOUT = (
    "HALF_OPERATORS",
    "HALF_CONVERSIONS",
    "BFLOAT16_CONVERSIONS",
    "HALF2_OPERATORS",
)  # as in PyTorch's builder
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", *(f"-D__CUDA_NO_{name}__" for name in WITHOUT))
TYPES = {"float": "float32", "double": "float64", "__half": "float16", "__nv_bfloat16": "bfloat16"}


@dataclass
class Kernel:
    """The machine code of one kernel.

    `stores` and `loads` count the instructions for global memory by their width in bits. `loop` is the number of
    instructions of the longest loop that stores outputs, 0 if there is none. `outputs` is what a thread stores in one
    round of that loop, or in total if there is no loop.
    """

    name: str
    registers: int = 0
    instructions: int = 0
    loop: int = 0
    outputs: int = 0
    branches: int = 0
    local: int = 0  # accesses to memory because the registers do not suffice
    stores: Counter[int] = field(default_factory=Counter)
    loads: Counter[int] = field(default_factory=Counter)

    @property
    def item_bits(self) -> int:
        """Bits of one output."""
        return {"float32": 32, "float64": 64}.get(re.findall(r"\w+", self.name)[1], 16)

    @property
    def pack(self) -> int:
        """Outputs of one store."""
        return int(re.findall(r"\w+", self.name)[2])

    @property
    def per_output(self) -> float:
        """Instructions per output: of the loop, or of the whole kernel if it has no loop. All branches count."""
        return (self.loop or self.instructions) / self.outputs

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that its registers allow."""
        return min(2048 // THREADS, 65536 // (-(-self.registers // 8) * 8 * THREADS))


def cuobjdump() -> str | None:
    """Return the path of cuobjdump; None if there is none."""
    home, triton = toolchain.cuda_home(), importlib.util.find_spec("triton")
    places = [] if home is None else [str(home / "bin")]
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=":".join(places)) or shutil.which("cuobjdump")


def kernels(architecture: str = "sm_90", sources: Path | None = None) -> dict[str, Kernel]:
    """Compile the kernels for an architecture and return what their machine code consists of, by name.

    Args:
        architecture: such as `sm_90`.
        sources: the folder of the sources; None: the package's.
    """
    home, tool = toolchain.cuda_home(), cuobjdump()
    assert home is not None and tool is not None, "nvcc and cuobjdump are needed"
    files = sorted((sources or Path(toolchain.__file__).parent / "csrc").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        cubins = [str(Path(folder) / f"{file.stem}.cubin") for file in files]
        nvcc = [str(home / "bin" / "nvcc"), *toolchain.host_compiler_flags()]
        command = [*nvcc, *FLAGS, f"-arch={architecture}", "-cubin"]
        running = [subprocess.Popen([*command, str(file), "-o", out]) for file, out in zip(files, cubins, strict=True)]
        if any([process.wait() for process in running]):
            raise RuntimeError("nvcc failed")
        found: dict[str, Kernel] = {}
        for cubin in cubins:
            used = _output(tool, "-res-usage", cubin)
            registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", used))
            text = _output(tool, "-sass", cubin)
            for mangled, code in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.DOTALL):
                kernel = _read(_readable(mangled), code)
                kernel.registers = int(registers[mangled])
                found[kernel.name] = kernel
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _readable(mangled: str) -> str:
    """Return a name such as `fir_epilogue<bfloat16, 8, 4, last>`."""
    full = _output("c++filt", mangled)
    match = re.search(r"(\w+)<(.*?)>\(psp::", full)
    assert match, full
    arguments = re.sub(r"\((?:int|bool)\)", "", match[2]).split(", ")
    order = {"true": "last", "false": "planes", "1": "last", "0": "planes"}[arguments[-1]]
    return f"{match[1]}<{', '.join([TYPES[arguments[0]], *arguments[1:-1], order])}>"


def _instructions(code: str) -> Iterator[tuple[int, str, str]]:
    """Yield address, operation and operands of each instruction up to the padding after the code."""
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code):
        _, operation, operands = re.match(r"(@!?U?P\w+ )?(\S+)\s*(.*)", text.strip()).groups()  # type: ignore[union-attr]
        yield int(address, 16), operation, operands


def _width(operation: str) -> int:
    named = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8}
    return next((named[part] for part in operation.split(".") if part in named), 32)


def _read(name: str, code: str) -> Kernel:
    kernel = Kernel(name)
    stores: dict[int, int] = {}
    for address, operation, operands in _instructions(code):
        if operation == "NOP":
            continue
        kernel.instructions += 1
        kind = operation.partition(".")[0]
        if kind == "STG":
            kernel.stores[_width(operation)] += 1
            stores[address] = _width(operation)
        elif kind == "LDG":
            kernel.loads[_width(operation)] += 1
        elif kind in ("LDL", "STL"):
            kernel.local += 1
        elif kind == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands)):
            kernel.branches += 1
            start, length = int(target[1], 16), (address - int(target[1], 16)) // 16 + 1
            stored = sum(bits for place, bits in stores.items() if start <= place <= address)
            if stored and length > kernel.loop:
                kernel.loop, kernel.outputs = length, stored // kernel.item_bits
    kernel.outputs = kernel.outputs or sum(stores.values()) // kernel.item_bits
    return kernel


def table(found: dict[str, Kernel]) -> str:
    """Return a table of the kernels, in Markdown."""
    lines = ["| Kernel | Instructions | Loop | Per output | Stores | Loads | Registers | Blocks per SM | Branches |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for kernel in found.values():
        widths = (
            " ".join(f"{n}x{bits}" for bits, n in sorted(count.items(), reverse=True))
            for count in (kernel.stores, kernel.loads)
        )
        row = (kernel.name, kernel.instructions, kernel.loop or "", f"{kernel.per_output:.0f}", *widths)
        lines.append("| " + " | ".join(map(str, (*row, kernel.registers, kernel.blocks, kernel.branches))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernels(*sys.argv[1:])))

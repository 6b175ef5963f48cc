"""psp-doctor: check the data of a training, the installed packages, and the CUDA kernels."""

from __future__ import annotations

import os
import sys

from psp_lightning.cli import check_data
from psp_lightning.cli.help import page
from psp_lightning.cli.installed import print_installed
from psp_lightning.cli.mistakes import guard
from psp_lightning.cli.settings import command, parse, quote_text, verb
from psp_lightning.utils.errors import UserError

USAGE = "psp-doctor ops"
HELP = f"""psp-doctor finds what is wrong before a training starts.

psp-doctor                        what is installed, and the command for each part that is missing
psp-doctor data [SETTINGS]        check the data, with the settings of psp-train: psp-doctor data --help
{USAGE} [build=true] [check=false]

ops prints which kernels are used, why, and which tools build them.

build   build them now, even without a GPU (for the architectures in TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0")
check   on a GPU: compare every kernel with plain PyTorch in float64 (default: true)

Status 0: what PSP_OPS asks for is available and correct; on a GPU, auto asks for the kernels. Status 1: it is not
available, the build failed, or a kernel is wrong.
Environment: PSP_OPS=auto|cuda|ref, PSP_OPS_DIR=folder of built kernels, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""


def _line(name: str, value: object) -> None:
    print(f"{name:<15} {value}")


def report(build: bool = False, check: bool = True) -> bool:
    """Print the report; return whether what `$PSP_OPS` asks for is available and correct."""
    import torch

    from psp_lightning.ops import dispatch
    from psp_lightning.ops.cuda import build as jit
    from psp_lightning.ops.cuda import toolchain

    choice, gpus = dispatch.choice(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    architectures = toolchain.architectures()
    home = toolchain.cuda_home()
    _line("PSP_OPS", choice + ("" if os.environ.get("PSP_OPS") else " (not set)"))
    _line("torch", f"{torch.__version__}, built with CUDA {torch.version.cuda or '- none'}")
    _line("CUDA toolkit", f"{home}, nvcc {toolchain.nvcc_version(home) or 'does not run'}" if home else "not found")
    _line("ninja", toolchain.ninja_version() or "not found")
    _line("C++ compiler", toolchain.compiler_version() or "not found")
    for i in range(gpus):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        _line(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {capability}")
    if not gpus:
        _line("GPU", "none that PyTorch can use")
    _line("architectures", " ".join(architectures) or "none")
    folder = jit.ops_dir() / (toolchain.key(architectures) if architectures else "")
    _line("kernels in", folder)
    built = bool(architectures) and jit.is_complete(folder)
    problem = "" if built else toolchain.missing()
    if build:
        print("building, which takes about a minute ...", flush=True)
        try:
            jit.ensure_built(architectures)
            built, problem = True, ""
        except jit.BuildError as error:
            built, problem = False, str(error)
    good = built or not build
    _line("built", "yes" if built else f"no: {problem}" if problem else "no (build=true or the first use builds them)")

    used, why = _decide(choice, gpus, problem)
    _line("in use", f"{'CUDA kernels' if used else 'plain PyTorch'}: {why}")
    if not used and (choice == "cuda" or (choice == "auto" and gpus)):
        good = False
    if used and check:
        good = _check() and good
    return good


def _decide(choice: str, gpus: int, problem: str) -> tuple[bool, str]:
    """Return whether kernels are used, and why; on a GPU, build and load them."""
    if choice == "ref":
        return False, "PSP_OPS=ref is set"
    if not gpus:
        return False, "there is no GPU" + (", so PSP_OPS=cuda fails" if choice == "cuda" else "")
    if problem:
        return False, problem
    from psp_lightning.ops.cuda import build as jit

    try:
        if jit.kernels() is not None:
            return True, "built, loaded, and there is a GPU"
    except UserError as error:
        return False, str(error)
    return False, "the warning above gives the reason"


def _check() -> bool:
    """Compare the kernels with the reference on every GPU; return whether all agree."""
    import torch

    from psp_lightning.ops.check import run_checks

    good = True
    for i in range(torch.cuda.device_count()):
        results = list(run_checks(torch.device("cuda", i)))
        wrong = [result for result in results if not result.good]
        for result in wrong:
            print(f"  WRONG  {result.name}: error {result.error:.1e}, allowed {result.bound:.1e}")
        worst = max(results, key=lambda result: result.error / result.bound)
        _line(
            f"check on GPU {i}",
            f"{len(results) - len(wrong)} of {len(results)} agree with float64; the largest error is "
            f"{worst.error / worst.bound:.0%} of the allowed error ({worst.name})",
        )
        good = good and not wrong
    return good


def run(arguments: list[str]) -> None:
    """Run the command without or with `ops`."""
    if not arguments:
        if not print_installed():
            sys.exit(1)
        return
    verb("psp-doctor", arguments, ["data", "ops"])
    if not report(**parse(arguments[1:], {"build": False, "check": True}, [], USAGE)):
        sys.exit(1)


def main() -> None:
    """Entry point of `psp-doctor`."""
    if sys.argv[1:2] != ["data"]:
        command(HELP, run, needs_arguments=False)
        return
    del sys.argv[1]
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(page("psp-doctor data"))
        return
    guard(check_data.run, quote_text)


if __name__ == "__main__":
    main()

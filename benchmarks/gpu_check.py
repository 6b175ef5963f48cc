"""Check the CUDA kernels, networks and commands on a GPU, and write one report.

    python -m benchmarks.gpu_check [FOLDER]

The steps are in the order in which a failure is cheapest to understand. All run, whatever fails before them. They need
PyTorch with CUDA, nvcc, g++, ninja and pytest. A step that lacks something else is left out, and the report names what
is missing. FOLDER (default: gpu_check) receives report.md and the whole output of each step.

Status 0: all steps passed. 1: a step failed. 2: there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHOWN = 60  # last lines of each step's output in the report
METRICS = (
    "gpu__time_duration.sum,dram__bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "smsp__issue_active.avg.pct_of_peak_sustained_active,l1tex__t_requests_pipe_lsu_mem_global_op_st.sum,"
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum,lts__t_sectors_op_write.sum,smsp__inst_executed.sum"
)
DOCTOR = [sys.executable, "-m", "psp_lightning.cli.doctor", "ops"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SELF = [sys.executable, "-m", "benchmarks.gpu_check"]
PROGRAM = "import sys; from tests.ops.test_gpu import SANITISED as s; sys.argv[1:] = ['.']; exec(s)"
SANITISED = [sys.executable, "-c", PROGRAM]
MACHINE = """
import os, subprocess, torch
for command in ("nvidia-smi", "nvcc --version", "g++ --version"):
    print(subprocess.run(command, shell=True, capture_output=True, text=True).stdout)
print("torch", torch.__version__, "capability", torch.cuda.get_device_capability())
listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
print("TORCH_CUDA_ARCH_LIST", listed or "is not set")
"""


@dataclass(frozen=True)
class Step:
    """A command, its time limit in seconds, what to look for in its output, and the programs or modules it needs."""

    name: str
    command: list[str]
    limit: int
    look: str
    needs: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str:
        """Return the first program or module that is missing, or an empty string."""
        here = (n for n in self.needs if not shutil.which(n) and importlib.util.find_spec(n) is None)
        return next(here, "")


def steps() -> list[Step]:
    """Return the steps in their order."""
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a read outside a tensor is outside an allocation
    sanitisers = [
        Step(tool, ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9", *SANITISED], 200,
             "ERROR SUMMARY: 0 errors", ("compute-sanitizer",), no_cache)
        for tool, options in (
            ("memcheck", ("--report-api-errors", "no")),
            ("racecheck", ()),  # the tree in shared memory
            ("initcheck", ()),
        )
    ]  # fmt: skip
    profiler = ["ncu", "--kernel-name", "regex:epilogue|upfirdn", "--clock-control", "none", "--metrics", METRICS,
                *SELF, "launches"]  # fmt: skip
    return [
        Step("machine", [sys.executable, "-c", MACHINE], 60, "TORCH_CUDA_ARCH_LIST is not set or lists this GPU"),
        Step("build", [*DOCTOR, "build=true", "check=false"], 300, "built yes, in use CUDA kernels"),
        Step("agreement", DOCTOR, 600, "all agree; an error names the case", env={"CUDA_LAUNCH_BLOCKING": "1"}),
        *sanitisers,
        Step("tests", [*PYTEST, "-m", "gpu and not slow", "tests/ops"], 900, "all pass", ("pytest",)),
        Step("times", [*SELF, "kernels"], 240, "epilogue and bias_act at 85 % of the copy bandwidth or more"),
        Step("profile", profiler, 200,
             "16 sectors per request of a pack's store; issue_active above 80 %: too many instructions; bytes against "
             "the expected passes in docs/kernels.md", ("ncu",)),
        Step("graph", [*SELF, "graph"], 200, "no warning, difference 0, faster than eager at batch 1"),
        Step("inversion", [*SELF, "inversion"], 300, "a refiner at most doubles the time; a graph is faster"),
        Step("slow tests", [*PYTEST, "-m", "gpu and slow", "tests/ops"], 600, "all pass", ("pytest",)),
        Step("inversion tests", [*PYTEST, "-m", "gpu", "tests/unit"], 300, "all pass", ("pytest", "hydra", "lpips")),
        Step("commands", [*PYTEST, "tests/integration/test_gpu.py"], 1200, "all pass", ("pytest", "hydra", "lpips")),
    ]  # fmt: skip


def has_gpu() -> bool:
    """Return whether PyTorch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def run(folder: Path, plan: list[Step]) -> bool:
    """Run the steps, write the report after each, and return whether all passed."""
    folder.mkdir(parents=True, exist_ok=True)
    report, good = ["# The kernels on a GPU", ""], True
    for number, step in enumerate(plan):
        if missing := step.missing():
            result, output, seconds = f"left out: {missing} is missing", "", 0.0
        else:
            code, output, seconds = _call(step)
            result = {0: "passed", None: f"stopped after {step.limit} s"}.get(code, f"failed (status {code})")
            good = good and code == 0
        (folder / f"{number}_{step.name.replace(' ', '_')}.txt").write_text(output)
        print(f"{step.name}: {result} ({seconds:.0f} s)", flush=True)
        report += [f"## {number}. {step.name}: {result}", "", f"Look for: {step.look}. {seconds:.0f} s.", ""]
        report += ["```", *output.splitlines()[-SHOWN:], "```", ""]
        (folder / "report.md").write_text("\n".join(report))
    return good


def _call(step: Step) -> tuple[int | None, str, float]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **step.env}
    start = time.monotonic()
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(step.command, env=env, timeout=step.limit, **pipes)  # type: ignore[call-overload]
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code, output = None, stopped.stdout or b""
    return code, output.decode(errors="replace"), time.monotonic() - start


def kernels(device: str = "cuda", size: int = 1024) -> None:
    """Print the time of each kernel at the generator's largest shapes, for batches of 1 and 8."""
    from benchmarks.compare.kernels import measure_kernels
    from benchmarks.compare.report import kernel_table
    from benchmarks.compare.rows import FLOAT32, Job

    for batch in (1, 8):
        print(kernel_table(measure_kernels(Job("kernels", size, batch, FLOAT32, device, {}))["kernels"]), flush=True)


def launches(device: str = "cuda", size: int = 1024) -> None:
    """Run each kernel once at the generator's largest shape, for a profiler."""
    import torch

    from benchmarks.compare.kernels import kernels_at, sizes

    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for kernel in kernels_at(8, *sizes(size)[-1], dtype, device):
                kernel.run()


def graph(device: str = "cuda", size: int = 1024, count: int = 200, channels: int = 512, **encoder: Any) -> None:
    """Compare the network as a CUDA graph with eager calls while a DataLoader pins memory in another thread.

    Args:
        device: cuda; cpu makes the same calls without a graph.
        size: side of the generator's images.
        count: number of pictures, a multiple of 8.
        channels: largest number of channels of the generator.
        **encoder: arguments of the encoder; default: the published one.
    """
    import torch
    from torch.utils.data import DataLoader

    from benchmarks.compare.floor import best
    from psp_lightning import PSP
    from psp_lightning.inference.fixed_batch import FixedBatch
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator(size, max_channels=channels)
    made = GradualStyleEncoder(generator.n_styles, **encoder)
    net = PSP(made, generator, torch.randn(512) / 2, source={"kind": "rgb"}).to(device).eval()
    pictures = [torch.rand(3, made.input_size, made.input_size) * 2 - 1 for _ in range(8)] * (count // 8)
    for batch in (1, 8):
        eager = net.for_inference(torch.bfloat16)
        replayed = FixedBatch(eager, batch, compile=False, graph=True)
        worst, loader = 0.0, DataLoader(pictures, batch, num_workers=2, pin_memory=device == "cuda")
        with torch.inference_mode():
            for i, x in enumerate(loader):
                x = x.to(device, non_blocking=True)
                y = replayed(x)
                if i < 3:
                    worst = max(worst, float((y - eager(x)).abs().max()))
            times = [1e3 * best(lambda f=f, x=x: f(x), device, 3) for f in (eager, replayed)]
        print(f"batch {batch}: difference {worst:.1e}, eager {times[0]:.2f} ms, graph {times[1]:.2f} ms", flush=True)


def inversion(device: str = "cuda", size: int = 1024, steps: int = 20, channels: int = 512, **encoder: Any) -> None:
    """Print the time from a call to its result: inversions with and without a refiner, and steps of optimisation.

    Args:
        device: cuda or cpu.
        size: side of the generator's images.
        steps: number of Adam steps, with l2 as the only loss and one image.
        channels: largest number of channels of the generator.
        **encoder: arguments of the encoder; default: the published one.
    """
    import torch

    from psp_lightning import PSP
    from psp_lightning.inference.fixed_batch import FixedBatch
    from psp_lightning.inference.optimize import Optimizer
    from psp_lightning.models.encoders import GradualStyleEncoder
    from psp_lightning.models.refiner import FeatureRefiner
    from psp_lightning.models.stylegan2 import Generator

    torch.manual_seed(0)
    generator = Generator(size, max_channels=channels)
    made = GradualStyleEncoder(generator.n_styles, **encoder)
    side = max(16, size // 16)
    refiner = FeatureRefiner(side, generator.feature_channels[side], made.input_size)
    average, source = torch.randn(generator.style_dim) / 2, {"kind": "rgb", "size": made.input_size}
    nets = {
        "encoder": PSP(made, generator, average, source=source).to(device).eval(),
        "encoder and refiner": PSP(made, generator, average, source=source, refiner=refiner).to(device).eval(),
    }

    def seconds(run: Any) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for batch in (1, 8):
        x = torch.rand(batch, 3, made.input_size, made.input_size, device=device) * 2 - 1
        for dtype in (torch.float32, torch.bfloat16):
            for name, net in nets.items():
                eager = net.for_inference(dtype)
                graph = FixedBatch(eager, batch, compile=False, graph=True)
                with torch.inference_mode():
                    times = [1e3 * min(seconds(lambda f=f, x=x: f(x)) for _ in range(6)) for f in (eager, graph)]
                text = f"eager {times[0]:.1f} ms, graph {times[1]:.1f} ms"
                print(f"{name}, batch {batch}, {dtype}: {text}", flush=True)
    net = nets["encoder and refiner"]
    image = torch.rand(1, 3, size, size, device=device) * 2 - 1
    small = torch.rand(1, 3, made.input_size, made.input_size, device=device) * 2 - 1

    def distance(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y_hat - y).square().mean((1, 2, 3))

    with torch.no_grad():
        first = net.invert(small)
        for space in ("w_plus", "features", "weights"):
            Optimizer(distance, space=space, steps=2)(net, first, image)  # the first steps allocate memory
            method = Optimizer(distance, space=space, steps=steps)
            time_of_all = seconds(lambda method=method: method(net, first, image))
            print(f"optimisation of {space}: {1e3 * time_of_all / steps:.1f} ms a step", flush=True)


def main(arguments: list[str]) -> int:
    """Run the check, or one of its measurements; return the status."""
    if not has_gpu():
        print("gpu-check: PyTorch finds no GPU, so nothing was checked. Run it on a machine with an NVIDIA GPU.")
        return 2
    measurements = {"kernels": kernels, "launches": launches, "graph": graph, "inversion": inversion}
    if len(arguments) == 1 and arguments[0] in measurements:
        measurements[arguments[0]]()
        return 0
    folder = Path(arguments[0] if arguments else "gpu_check")
    good = run(folder, steps())
    print(f"report: {folder / 'report.md'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

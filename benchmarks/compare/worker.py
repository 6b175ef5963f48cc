"""A process that sets up one side of a row and runs it on request.

The parent writes one JSON object per line to the standard input of the process and reads one per line from its standard
output. Output of the libraries goes to standard error. Start it as `python -m benchmarks.compare.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from benchmarks.compare.case import Case
from benchmarks.compare.rows import REFERENCE, REFERENCE_KEPT, Job

ROOT = Path(__file__).parents[2]


class WorkerError(Exception):
    """A failed request to a worker. The message contains the end of its output; `side` is its side."""

    side: str | None = None


class OutOfMemory(WorkerError):
    """A worker that the system ended, or in which PyTorch got no memory."""


class Worker:
    """The parent's end of a worker process.

    Args:
        job: the set-up of the worker.
        environment: additional environment variables of the process.
        root: the checkout whose code it runs.

    Raises:
        WorkerError: in every method, if the process fails.
    """

    def __init__(self, job: Job, environment: dict[str, str] | None = None, root: Path = ROOT) -> None:
        self.job = job
        path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare.worker"], cwd=root, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        self._send(job.plain())

    def ready(self) -> dict[str, Any]:
        """Wait until everything is set up, and return seconds and notes of the set-up."""
        return self._answer()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and return its answer: `run` (seed), `check` (seed, path) or `floor`."""
        self._send({"do": do, **values})
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> WorkerError:
        code = self._process.wait()
        self._log.seek(0)
        last = "\n".join(self._log.read().decode(errors="replace").strip().splitlines()[-12:])
        text = f"{self.job.kind} {self.job.size}, {self.job.side}: worker ended with status {code}.\n{last}"
        refused = any(
            word in last for word in ("can't allocate memory", "OutOfMemoryError", "MemoryError", "bad_alloc")
        )
        error = OutOfMemory(text) if code == -signal.SIGKILL or refused else WorkerError(text)
        error.side = self.job.side
        return error


# --- the process itself


def peak_bytes(device: str) -> int:
    """Return the peak memory so far: of CUDA's allocator, or the resident memory of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would start with the parent's peak
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak(device: str) -> None:
    """Reset the peak if the system can, so that memory of the set-up does not count."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def prepare(job: Job) -> Case:
    """Set up the side. Modules are imported here, so that one side does not load the other's modules."""
    if job.side in (REFERENCE, REFERENCE_KEPT):
        from benchmarks.compare import reference

        return reference.prepare(job)
    from benchmarks.compare import ours

    return ours.prepare(job)


def work(job: Job, answer: Callable[[dict[str, Any]], None], requests: IO[str]) -> None:
    """Answer requests until the input ends."""
    import torch

    def wait() -> None:
        if job.device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    case = prepare(job)
    wait()
    answer({"seconds": time.perf_counter() - start, "notes": case.notes})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "run":
            inputs = case.draw(request["seed"])
            wait()
            reset_peak(job.device)
            start = time.perf_counter()
            result = case.run(inputs)
            wait()
            seconds = time.perf_counter() - start
            found = result if isinstance(result, dict) else None
            answer({"seconds": seconds, "peak": peak_bytes(job.device), "result": found})
        elif request["do"] == "check":
            torch.save(case.check(case.draw(request["seed"])), request["path"])
            answer({})
        elif request["do"] == "floor":
            answer(case.floor() if case.floor is not None else {})


def main() -> None:
    """Run the worker process."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep output of libraries apart from the answers

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    job = Job(**json.loads(sys.stdin.readline()))
    if job.side != REFERENCE and job.device == "cpu":  # the commands do this, too
        from psp_lightning.utils.memory import keep_freed_memory

        keep_freed_memory()
    work(job, answer, sys.stdin)


if __name__ == "__main__":
    main()

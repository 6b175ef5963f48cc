"""Commands whose ranks torchrun's agents or srun start, as on two machines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Machine:
    """One agent of torchrun, or one task of srun, with its output in a file."""

    def __init__(self, command: list[str], folder: Path, log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def ranks_in(folder: Path) -> list[int]:
    """Return the processes of this package that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir() if sys.platform.startswith("linux") else ():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").resolve() == folder and b"psp_lightning" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


Start = Callable[..., list[Machine]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a command on two machines: `start("torchrun", "train", *settings)`.

    Options: `delay`, seconds between their starts; `env`, variables of the second one; `c10d`, the rendezvous in which
    torchrun's agents agree on who is first; `port`; `only`, the machines to start.
    """
    running: list[Machine] = []

    def call(
        launcher: str, command: str, *arguments: str, delay: float = 0, env: dict[str, str] | None = None,
        c10d: bool = False, port: int | None = None, only: tuple[int, ...] = (0, 1),
    ) -> list[Machine]:  # fmt: skip
        port = port or free_port()
        module = ["-m", f"psp_lightning.cli.{command}", *map(str, arguments)]
        for node in only:
            own = dict(env or {}) if node else {}
            if launcher == "torchrun":
                place = [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
                if c10d:
                    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
                module = [*module[:2], *map(str, arguments)]
                run = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place, *module]
            else:
                own |= {
                    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
                    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_PROCID": str(node), "SLURM_LOCALID": "0",
                    "SLURM_NODEID": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                run = module
            log = tmp_path / f"machine_{len(running)}.log"
            running.append(Machine([sys.executable, *run], tmp_path, log, own))
            time.sleep(delay)
        return running[-len(only) :]

    yield call
    unfinished = [machine for machine in running if machine.process.poll() is None]
    for machine in unfinished:
        os.killpg(machine.process.pid, signal.SIGKILL)
        machine.process.wait()
    deadline = time.time() + 60
    while left := [] if unfinished else ranks_in(tmp_path):
        assert time.time() < deadline, f"processes {left} outlived the command"
        time.sleep(0.2)


def succeed(machines: list[Machine]) -> None:
    codes = [machine.wait() for machine in machines]
    assert codes == [0, 0], "\n".join(machine.output for machine in machines)

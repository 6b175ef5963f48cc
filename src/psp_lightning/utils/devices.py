"""Device settings, resolved on this machine, and the ranks that they start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from psp_lightning.utils.errors import UserError, plural, suggest

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def resolve_devices(accelerator: str, devices: Any) -> tuple[str, int | list[int]]:
    """Return accelerator and devices for a Trainer; the devices are a number, or a list of CUDA device ids.

    Args:
        accelerator: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        devices: a number, `auto` or -1 (all), or ids as a list or comma-separated text.

    Raises:
        UserError: the accelerator is unknown or missing, or `devices` is invalid or asks for too many devices.
    """
    import torch

    if accelerator not in ACCELERATORS:
        raise UserError(
            f"accelerator={accelerator} is unknown.{suggest(accelerator, ACCELERATORS)} "
            f"Choose from: {', '.join(ACCELERATORS)}"
        )
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"accelerator={accelerator}: PyTorch finds no CUDA device. Use cpu (trainer=cpu) or auto.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator=mps: PyTorch finds no Apple GPU. Use cpu (trainer=cpu) or auto.")
    cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    available = torch.cuda.device_count() if cuda else 1
    if devices in ("auto", -1, "-1"):
        return accelerator, available
    try:
        if isinstance(devices, str):
            devices = [int(part) for part in devices.split(",")] if "," in devices else int(devices)
        chosen = devices if isinstance(devices, int) else [int(device) for device in devices]
        count = chosen if isinstance(chosen, int) else len(chosen)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise UserError(f"devices={devices!r}: give a number of at least 1, a list of device ids, or auto.")
    if cuda and (count > available or (isinstance(chosen, list) and max(chosen) >= available)):
        raise UserError(f"devices={devices!r}: this machine has {available} CUDA device(s).")
    return accelerator, chosen if cuda else count


def count_devices(accelerator: str, devices: Any) -> int:
    """Return the number of processes that the settings ask for; raise the errors of `resolve_devices`."""
    chosen = resolve_devices(accelerator, devices)[1]
    return chosen if isinstance(chosen, int) else len(chosen)


def gpus_of_a_job(accelerator: str, devices: Any) -> int | None:
    """Return how many GPUs a job of a sweep asks for; None for a training on the CPU.

    Args:
        accelerator: as in `resolve_devices`.
        devices: as in `resolve_devices`. All GPUs (`auto`, -1) are counted on this machine. With a list of ids, the
            job needs every GPU up to the highest id.

    Raises:
        UserError: all GPUs are asked for, but this machine has none, such as a cluster's login node.
    """
    import torch

    if accelerator in ("cpu", "mps"):
        return None
    if devices in ("auto", -1, "-1"):
        if not (count := torch.cuda.device_count()):
            raise UserError(
                f"trainer.devices={devices}: the jobs' GPUs cannot be counted on this machine, which has none. Set "
                "trainer.devices=NUMBER, or trainer=cpu."
            )
        return count
    ids = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    return int(devices) if isinstance(ids, int | str) else max(int(device) for device in ids) + 1


@dataclass(frozen=True)
class Rank:
    """This process as one of several that torchrun or srun started.

    Attributes:
        launcher: what started it, `torchrun` or `srun`.
        rank: number of this process, from 0.
        world: number of processes on all machines.
        per_node: number of processes on this machine; None if srun does not say so.
    """

    launcher: str
    rank: int
    world: int
    per_node: int | None

    @property
    def nodes(self) -> int:
        """Return the number of machines."""
        return self.world // (self.per_node or self.world)


def started_rank() -> Rank | None:
    """Return what the environment says about this rank, or None if this process is the whole run.

    If None, a command that needs several processes starts them itself. PyTorch's variables (torchrun and the ranks that
    `cli.launch` starts) take precedence over Slurm's, as in Lightning. The script of sbatch, an interactive shell in a
    job and a single task of srun have Slurm's variables, too, but are not ranks. As in Lightning, a job is an
    interactive shell if it is named `bash` or `interactive`.
    """
    env = os.environ
    if "RANK" in env and "LOCAL_RANK" in env:
        per_node = env.get("LOCAL_WORLD_SIZE")
        found = Rank("torchrun", int(env["RANK"]), int(env.get("WORLD_SIZE", 1)), int(per_node) if per_node else None)
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        script = env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env  # srun adds the step
        if script or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        per_node = env.get("SLURM_NTASKS_PER_NODE")
        found = Rank("srun", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(per_node) if per_node else None)
    else:
        return None
    return found if found.world > 1 else None


def is_first_rank() -> bool:
    """Return whether this process is the first rank, as torchrun, srun and Lightning number them, or the only one."""
    rank = started_rank()
    return rank.rank == 0 if rank else os.environ.get("LOCAL_RANK", "0") == "0"


def count_nodes() -> int:
    """Return the number of machines on which ranks of this command run."""
    rank = started_rank()
    return rank.nodes if rank else 1


def is_restarted() -> bool:
    """Return whether Slurm has put this job back into the queue and starts it again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def check_launched(local: int, nodes: int | None, key: str = "trainer.devices") -> None:
    """Raise a UserError if torchrun or srun did not start the processes that the settings ask for.

    Otherwise each process would act as the whole run, or wait for others that do not come.

    Args:
        local: number of devices on each machine in the settings.
        nodes: number of machines in the settings (`trainer.num_nodes`); None: as many as there are.
        key: the setting of `local`.
    """
    rank = started_rank()
    if rank is None:
        if nodes is not None and nodes > 1:
            raise UserError(
                f"trainer.num_nodes={nodes}: start the command on every machine, with torchrun or srun, or set "
                "trainer.num_nodes=1. docs/scaling.md shows how."
            )
        return
    if rank.per_node is None:
        raise UserError(
            f"{rank.launcher} does not say how many processes run on each machine: give srun --ntasks-per-node={local}."
        )
    if rank.per_node != local:
        raise UserError(
            f"{rank.launcher} started {rank.per_node} processes on this machine, but {key} asks for {local}. "
            "Use the same number for both."
        )
    if nodes is not None and rank.world != local * nodes:
        raise UserError(
            f"{rank.launcher} started {rank.world} processes in total, but {key}={local} and trainer.num_nodes={nodes} "
            f"ask for {local * nodes}. Set trainer.num_nodes={rank.nodes}, or start them on {plural(nodes, 'machine')}."
        )

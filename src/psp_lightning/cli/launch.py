"""Runs one composed job in one process, or in n ranks started for this job alone.

Lightning's own DDP relaunch repeats the command line, and with `-m` that repeats the whole sweep in every rank. Here
the Hydra process is no rank: it freezes the composed job, starts n workers through PyTorch's elastic launcher and takes
the value of rank 0. Each sweep job therefore gets its own ranks, its own process group and exactly one run directory.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict

from psp_lightning.utils.errors import UserError

Job = Callable[[DictConfig], Any]


def launch(job: Job, cfg: DictConfig, n_processes: int) -> Any:
    """Run `job(cfg)` here, or in `n_processes` ranks; returns the value of rank 0.

    Under torchrun or srun (`LOCAL_RANK` is set) the process already is a rank and runs the job itself.

    Args:
        job: an importable function; it is called in every rank.
        cfg: the composed configuration; frozen (interpolations and `${now:}` resolved) before it is handed on.
        n_processes: ranks on this machine.

    Raises:
        UserError: what a rank raised, once.
        RuntimeError: any other failure of a rank, with its traceback.
    """
    if n_processes == 1 or "LOCAL_RANK" in os.environ:
        return job(cfg)
    import multiprocessing

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("spawn", force=True)  # a joblib worker has set 'loky', unknown to torch
    for part in ("", ".multiprocessing.api", ".agent.server.api"):  # the failure is reported below, once
        logging.getLogger(f"torch.distributed.elastic{part}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory(prefix="psp_ranks_") as messages:
        try:
            results = elastic_launch(config, _rank)(job, _freeze(cfg), os.getcwd(), messages, os.getpid())
        except ChildFailedError as error:
            told = sorted(Path(messages).iterdir())
            if told:
                raise UserError(told[0].read_text()) from None
            raise RuntimeError(str(error)) from None
        except SignalException:  # the ranks were told, and have stopped after their step
            raise KeyboardInterrupt from None
        return results[0]


def _freeze(cfg: DictConfig) -> tuple[str, str]:
    # YAML text: Hydra's plug-in configuration classes do not pickle
    return OmegaConf.to_yaml(cfg, resolve=True), OmegaConf.to_yaml(HydraConfig.instance().cfg.hydra)  # type: ignore[union-attr]


def _thaw(state: tuple[str, str]) -> DictConfig:
    hydra = OmegaConf.structured(HydraConf)
    with open_dict(hydra):
        hydra.merge_with(OmegaConf.create(state[1]))
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))
    cfg = DictConfig(OmegaConf.create(state[0]))
    OmegaConf.set_struct(cfg, True)
    return cfg


def _rank(job: Job, state: tuple[str, str], folder: str, messages: str, parent: int) -> Any:
    import torch

    _die_with(parent)
    os.chdir(folder)
    cfg = _thaw(state)
    rank = os.environ["LOCAL_RANK"]
    if rank == "0":
        hydra = HydraConfig.get()
        configure_log(hydra.job_logging, hydra.verbose)  # type: ignore[arg-type]
    if not torch.cuda.is_available():  # ranks on one processor share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        return job(cfg)
    except UserError as error:
        (Path(messages) / f"rank_{rank}").write_text(str(error))
        raise SystemExit(1) from None


def _die_with(parent: int) -> None:
    """Ask the kernel to end this rank when its parent ends, however it ends (Linux; elsewhere elastic's own watch)."""
    import ctypes
    import signal
    import sys

    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)

"""Run one composed job in this process, or in n ranks that start only for this job.

Lightning's DDP starts its other ranks by repeating the command line; with `-m`, every rank would repeat the whole
sweep. Here the Hydra process is not a rank: it freezes the composed job, starts n workers with PyTorch's elastic
launcher and returns the value of rank 0. Each job of a sweep has its own ranks, process group and run directory.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict

from psp_lightning.cli.mistakes import end_on_sigterm, message
from psp_lightning.cli.ranks import as_rank, die_with
from psp_lightning.utils.devices import started_rank
from psp_lightning.utils.errors import UserError

Job = Callable[[DictConfig], Any]
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # for file names that are not UTF-8


def launch(job: Job, cfg: DictConfig, n_processes: int) -> Any:
    """Run `job(cfg)` in this process, or in `n_processes` ranks; return the value of rank 0, or this rank's value.

    If torchrun or srun started this process as one of several ranks, it runs the job itself.

    Args:
        job: an importable function; every rank calls it.
        cfg: the composed configuration; the ranks receive it frozen (interpolations and `${now:}` are resolved).
        n_processes: number of ranks on this machine.

    Raises:
        UserError: a rank raised it or an OSError; several ranks' errors are reported once. Or another rank of torchrun
            or srun is lost or has other versions.
        RuntimeError: a rank failed in any other way; the message contains its traceback.
    """
    if started_rank() is not None:
        return as_rank(partial(job, cfg), OmegaConf.select(cfg, "paths.output_dir"))
    if n_processes == 1:
        return job(cfg)
    import multiprocessing

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("spawn", force=True)  # a joblib worker has set 'loky', unknown to torch
    elastic = "distributed.elastic"
    for name in (elastic, f"{elastic}.multiprocessing.api", f"{elastic}.agent.server.api", "multiprocessing.spawn"):
        logging.getLogger(f"torch.{name}").setLevel(logging.CRITICAL)  # the failure is reported below, once
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # ranks print file names, too
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
    # YAML text, because Hydra's plugin configuration classes do not pickle
    frozen = OmegaConf.to_yaml(cfg, resolve=True), OmegaConf.to_yaml(HydraConfig.instance().cfg.hydra)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="psp_ranks_") as messages:
        try:
            results = elastic_launch(config, _rank)(job, frozen, os.getcwd(), messages, os.getpid())
        except ChildFailedError as error:
            if reports := sorted(Path(messages).iterdir()):
                raise UserError(reports[0].read_text(**TEXT)) from None
            raise RuntimeError(str(error)) from None
        except SignalException:  # the ranks received it too, and have stopped after their step
            raise KeyboardInterrupt from None
        return results[0]


def _thaw(job_yaml: str, hydra_yaml: str) -> DictConfig:
    """Restore Hydra's own configuration and return the job's."""
    hydra = OmegaConf.structured(HydraConf)
    with open_dict(hydra):
        hydra.merge_with(OmegaConf.create(hydra_yaml))
    HydraConfig.instance().set_config(OmegaConf.create({"hydra": hydra}))
    cfg = DictConfig(OmegaConf.create(job_yaml))
    OmegaConf.set_struct(cfg, True)
    return cfg


def _rank(job: Job, frozen: tuple[str, str], folder: str, messages: str, parent: int) -> Any:
    import torch

    die_with(parent)  # the elastic launcher watches it, too
    end_on_sigterm()
    os.chdir(folder)
    cfg = _thaw(*frozen)
    rank = os.environ["LOCAL_RANK"]
    if rank == "0":
        hydra = HydraConfig.get()
        configure_log(hydra.job_logging, hydra.verbose)  # type: ignore[arg-type]
    if not torch.cuda.is_available():  # ranks on one processor share its cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        return job(cfg)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        (Path(messages) / f"rank_{rank}").write_text(message(error), **TEXT)
        raise SystemExit(1) from None

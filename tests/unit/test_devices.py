"""Which processes are ranks of torchrun or srun, and which start their ranks themselves."""

from __future__ import annotations

import pytest

from psp_lightning.utils.devices import Rank, check_launched, count_nodes, is_first_rank, started_rank
from psp_lightning.utils.errors import UserError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
TASK = {  # what Slurm sets in the script of sbatch, and what srun adds
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "faces", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "1", "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0",
}  # fmt: skip
SCRIPT = {**{key: value for key, value in TASK.items() if key != "SLURM_STEP_ID"}, "SLURM_PROCID": "0"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the variables of a launcher in place of all others."""

    def start(variables: dict[str, str]) -> None:
        for name in {*TORCHRUN, *TASK}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, None),
        (TORCHRUN, Rank("torchrun", 3, 4, 2)),
        (TASK, Rank("srun", 3, 4, 2)),
        ({**TASK, "ENVIRONMENT": ""}, Rank("srun", 3, 4, 2)),  # srun without sbatch
        ({**TASK, **TORCHRUN}, Rank("torchrun", 3, 4, 2)),  # srun starts torchrun on each machine
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Rank("srun", 1, 2, None)),
        (SCRIPT, None),
        ({**TASK, "SLURM_JOB_NAME": "bash"}, None),
        ({**TASK, "SLURM_JOB_NAME": "interactive"}, None),
        ({**TASK, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),  # submitit with tasks_per_node=1
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # the shell of salloc
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
    ],
)
def test_a_process_knows_whether_it_is_a_rank(variables: dict[str, str], rank: Rank | None, started) -> None:
    started(variables)
    assert started_rank() == rank
    assert count_nodes() == (2 if rank and rank.per_node else 1)
    assert is_first_rank() is (rank is None)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({**TORCHRUN, "RANK": "2", "LOCAL_RANK": "0"}, False),  # on a second machine
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({**TASK, "SLURM_PROCID": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),  # started by Lightning
        ({"LOCAL_RANK": "0"}, True),
    ],
)
def test_the_first_rank_claims(variables: dict[str, str], first: bool, started) -> None:
    started(variables)
    assert is_first_rank() is first


@pytest.mark.parametrize(
    ("variables", "local", "nodes", "words"),
    [
        (TORCHRUN, 1, 4, "torchrun started 2 processes on this machine, but trainer.devices asks for 1"),
        (TASK, 4, 1, "srun started 2 processes on this machine, but trainer.devices asks for 4"),
        (TORCHRUN, 2, 1, "torchrun started 4 processes in total, .*num_nodes=1 ask for 2. Set trainer.num_nodes=2"),
        (TORCHRUN, 2, 3, "torchrun started 4 processes in total, .* ask for 6. .*start them on 3 machines"),
        ({}, 1, 2, "trainer.num_nodes=2: start the command on every machine, with torchrun or srun"),
        ({}, 2, 2, "trainer.num_nodes=2: start the command on every machine, with torchrun or srun"),
        (SCRIPT, 2, 2, "trainer.num_nodes=2: start the command on every machine, with torchrun or srun"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 2, 1, "give srun --ntasks-per-node=2"),
    ],
)
def test_another_number_of_processes_is_refused(
    variables: dict[str, str], local: int, nodes: int, words: str, started
) -> None:
    started(variables)
    with pytest.raises(UserError, match=words):
        check_launched(local, nodes)


def test_the_right_number_of_processes(started) -> None:
    for variables in (TORCHRUN, TASK):
        started(variables)
        check_launched(2, 2)
        check_launched(2, None, "devices")
    started({})
    check_launched(4, 1)

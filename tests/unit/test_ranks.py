"""Errors about lost ranks, and errors that only look like them."""

from __future__ import annotations

import pytest
import torch

from psp_lightning.cli.ranks import reporting_lost_ranks
from psp_lightning.utils.errors import UserError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:41234"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(GLOO), r"has ended \(connection closed by peer, \[10.0.0.7\]:41234\)"),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: a peer has exited"), "ncclremoteerror"),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "no connection"),
    ],
)
def test_a_lost_rank_is_reported(error: RuntimeError, told: str) -> None:
    with pytest.raises(UserError, match=f"{told}.*Continue with resume=runs/r"), reporting_lost_ranks("runs/r"):
        raise error


def test_errors_of_other_connections_are_kept() -> None:
    error = RuntimeError("the object store: Broken pipe")
    with pytest.raises(RuntimeError) as caught, reporting_lost_ranks("runs/r"):
        raise error
    assert caught.value is error

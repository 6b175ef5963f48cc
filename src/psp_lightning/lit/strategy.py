"""Several devices without DistributedDataParallel, for modules that average their gradients themselves."""

from __future__ import annotations

import torch
from pytorch_lightning.strategies import DDPStrategy


class UnwrappedDDP(DDPStrategy):
    """Process group and launching of `DDPStrategy`; the module is not wrapped, its weights start as those of rank 0."""

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            torch.distributed.broadcast(tensor.detach(), 0)

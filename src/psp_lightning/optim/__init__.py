"""Optimizers that are not in torch.optim."""

from psp_lightning.optim.ranger import Ranger

__all__ = ["Ranger"]

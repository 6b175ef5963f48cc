"""Optimizers that torch.optim lacks."""

from psp_lightning.optim.ranger import Ranger

__all__ = ["Ranger"]

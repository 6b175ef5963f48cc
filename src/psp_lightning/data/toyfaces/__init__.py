"""Drawn faces with label maps, sketches and poses: data for every task without a download."""

from psp_lightning.data.toyfaces.faces import ToyFaces

__all__ = ["ToyFaces"]

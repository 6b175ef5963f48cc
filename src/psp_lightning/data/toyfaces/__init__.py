"""Toy faces: drawn faces with label maps, sketches and poses, the data for every task without a download."""

from psp_lightning.data.toyfaces.faces import Drawing, ToyFaces, write_dataset

__all__ = ["Drawing", "ToyFaces", "write_dataset"]

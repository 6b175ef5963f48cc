"""A small face parser for measurements on the toy faces: it finds six kinds of region in an image.

Source: designed for this library; a network with shortcuts between equal resolutions, as in U-Net (arXiv:1505.04597).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.models.registry import record_config, register_embedding

# Kinds of region, and the classes of CelebAMask-HQ that each of them merges
KINDS = {
    "background": ("background",),
    "skin": ("skin", "nose", "l_ear", "r_ear", "neck"),
    "eyes": ("l_eye", "r_eye", "l_brow", "r_brow", "eye_g"),
    "mouth": ("mouth", "u_lip", "l_lip"),
    "hair": ("hair", "hat"),
    "clothes": ("cloth", "neck_l", "ear_r"),
}


@register_embedding
class ToyFaceParser(nn.Module):
    """A network from images to a score for each kind of region at each pixel."""

    @record_config
    def __init__(
        self,
        input_size: int = 64,  # side of the images; other images are resized
        width: int = 24,  # channels at the full resolution
    ) -> None:
        super().__init__()
        self.input_size = input_size

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        w = width
        self.down = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w), block(4 * w, 4 * w)])
        self.up = nn.ModuleList([block(8 * w, 2 * w), block(4 * w, w), block(2 * w, w)])
        self.score = nn.Conv2d(w, len(KINDS), 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to scores (B, kinds, S, S), where S is `input_size`."""
        size = (self.input_size, self.input_size)
        if image.shape[-2:] != size:
            larger = min(image.shape[-2:]) > self.input_size
            image = F.adaptive_avg_pool2d(image, size) if larger else F.interpolate(image, size, mode="bilinear")
        kept = []
        for i, block in enumerate(self.down):
            image = block(image if i == 0 else F.max_pool2d(image, 2))
            kept.append(image)
        for block, shortcut in zip(self.up, kept[-2::-1], strict=True):
            image = block(torch.cat([F.interpolate(image, scale_factor=2), shortcut], 1))
        return self.score(image)

    def regions(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to the index of the kind of each pixel, int64 (B, S, S)."""
        return self(image).argmax(1)

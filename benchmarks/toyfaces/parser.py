"""A small face parser for measurements on the toy faces: it finds six kinds of region in an image.

The 19 classes of CelebAMask-HQ are merged into background, skin (with nose, ears, neck), eyes (with brows and glasses),
mouth, hair (with hat) and clothes (with jewellery).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.toyfaces.faces import draw
from psp_lightning.data.labels import CELEBAMASK_HQ, load_label_map

KINDS = ("background", "skin", "eyes", "mouth", "hair", "clothes")
_KIND_OF = {
    "background": 0, "skin": 1, "nose": 1, "l_ear": 1, "r_ear": 1, "neck": 1, "l_eye": 2, "r_eye": 2, "l_brow": 2,
    "r_brow": 2, "eye_g": 2, "mouth": 3, "u_lip": 3, "l_lip": 3, "hair": 4, "hat": 4, "cloth": 5, "neck_l": 5,
    "ear_r": 5,
}  # fmt: skip


def kinds(labels: np.ndarray) -> Tensor:
    """Map class ids, uint8 (n, H, W), to indices of `KINDS`, int64 (n, H, W)."""
    label_map = load_label_map(CELEBAMASK_HQ)
    table = np.zeros(256, np.int64)
    for number, name in zip(label_map.ids, label_map.names, strict=True):
        table[number] = _KIND_OF[name]
    return torch.from_numpy(table[labels])


class Parser(nn.Module):
    """A network with three resolutions down and up and shortcuts: (B, 3, 64, 64) to scores (B, 6, 64, 64)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        w = width
        self.down = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w), block(4 * w, 4 * w)])
        self.up = nn.ModuleList([block(8 * w, 2 * w), block(4 * w, w), block(2 * w, w)])
        self.score = nn.Conv2d(w, len(KINDS), 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for block, shortcut in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), shortcut], 1))
        return self.score(x)


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Return the intersection over union, counted over all pixels of all images, averaged over classes."""
    shares = []
    for kind in range(len(KINDS)):
        a, b = predicted == kind, labels == kind
        shares.append(float((a & b).sum() / (a | b).sum().clamp_min(1)))
    return float(np.mean(shares))


@torch.enable_grad()  # callers measure without gradients
def load_parser(path: Path, steps: int = 1500, seed: int = 0) -> Parser:
    """Load the parser from `path`; train and write it first if the file does not exist."""
    network = Parser().to(memory_format=torch.channels_last)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    print("training the parser", flush=True)
    torch.manual_seed(seed)
    faces = draw(seed=21, n=6000)
    labels = kinds(faces.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (16,))
        loss = F.cross_entropy(network(faces.images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(network.state_dict(), part)
    part.replace(path)
    return network.eval()

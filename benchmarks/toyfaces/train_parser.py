"""Train the face parser of the toy domain: `python -m benchmarks.toyfaces.train_parser --out FILE`.

It takes about five minutes on one core. `benchmarks.toyfaces.release --parser FILE` puts the result into the package.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.toyfaces.faces import draw
from psp_lightning.checkpoints.weight_files import save_embedding
from psp_lightning.data.labels import CELEBAMASK_HQ, load_label_map
from psp_lightning.models.face_parser import KINDS, ToyFaceParser


def kinds(labels: np.ndarray) -> Tensor:
    """Map class ids of CelebAMask-HQ, uint8 (n, H, W), to indices of `KINDS`, int64 (n, H, W)."""
    label_map = load_label_map(CELEBAMASK_HQ)
    kind_of = {name: kind for kind, names in enumerate(KINDS.values()) for name in names}
    table = np.zeros(256, np.int64)
    for number, name in zip(label_map.ids, label_map.names, strict=True):
        table[number] = kind_of[name]
    return torch.from_numpy(table[labels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the weight file to write")
    parser.add_argument("--faces", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    start = time.monotonic()
    faces, held_out = draw(seed=21, n=options.faces), draw(seed=22, n=200)
    labels, truth = kinds(faces.labels), kinds(held_out.labels)
    print(f"{options.faces} faces drawn in {time.monotonic() - start:.0f} s", flush=True)
    network = ToyFaceParser().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps)
    for step in range(1, options.steps + 1):
        chosen = torch.randint(len(labels), (options.batch,))
        loss = F.cross_entropy(network(faces.images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == options.steps:
            network.eval()
            with torch.no_grad():
                right = (network.regions(held_out.images) == truth).float().mean()
            network.train()
            print(
                f"step {step}  loss {loss.item():.4f}  right {right:.4f}  {time.monotonic() - start:.0f} s", flush=True
            )
    origin = {
        "command": "python -m benchmarks.toyfaces.train_parser",
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    save_embedding(options.out, network.eval(), origin)
    print(options.out)


if __name__ == "__main__":
    main()

"""Train the identity network of the toy faces: `python -m benchmarks.toyfaces.train_identity --out FILE`.

Two pictures of one person (in different pose, light, expression, clothes and background) should get similar embeddings,
and pictures of different people dissimilar ones. The pairs of a batch are each other's negatives.

Source: normalised temperature-scaled cross entropy, van den Oord et al. (arXiv:1807.03748), Chen et al.
(arXiv:2002.05709), over pairs of the same identity.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.checkpoints.weight_files import save_embedding
from psp_lightning.data.toyfaces import ToyFaces
from psp_lightning.models.embedding import ToyFaceEmbedding
from psp_lightning.utils.images import from_uint8


def draw(faces: ToyFaces) -> np.ndarray:
    """Draw every picture: uint8 (n, size, size, 3)."""
    return np.stack([faces.draw(i).image for i in range(len(faces))])


def batch(images: np.ndarray, indices: np.ndarray, flip: np.ndarray) -> Tensor:
    """Return float32 (len(indices), 3, size, size) in [-1, 1], mirrored if `flip` is true."""
    chosen = images[indices]
    chosen = np.where(flip[:, None, None, None], chosen[:, :, ::-1], chosen)
    return from_uint8(torch.from_numpy(np.ascontiguousarray(chosen)).permute(0, 3, 1, 2).contiguous())


def verification(network: ToyFaceEmbedding, images: np.ndarray, per_person: int) -> dict[str, float]:
    """Measure how well pairs of one person separate from pairs of two people, on people that training has not seen.

    Returns:
        `auc`: probability that a pair of one person is more similar than a pair of two; `tpr`: share of pairs of one
        person above the similarity that one in a thousand pairs of two people reaches; `same`, `different`: mean
        similarities of both kinds of pairs.
    """
    network.eval()
    with torch.no_grad():
        none = np.zeros(len(images), bool)
        parts = np.array_split(np.arange(len(images)), max(1, len(images) // 256))
        vectors = torch.cat([network(batch(images, part, none[part])) for part in parts])
    people = len(images) // per_person
    person = torch.arange(len(images)) % people  # sample i shows person i % people
    similarity = vectors @ vectors.t()
    upper = torch.ones_like(similarity, dtype=torch.bool).triu(1)
    equal = person[:, None] == person[None]
    same, different = similarity[upper & equal], similarity[upper & ~equal]
    threshold = different.kthvalue(int(0.999 * len(different))).values
    ranks = torch.searchsorted(different.sort().values, same).double() / len(different)
    network.train()
    return {
        "auc": float(ranks.mean()),
        "tpr": float((same > threshold).double().mean()),
        "same": float(same.mean()),
        "different": float(different.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the weight file to write")
    parser.add_argument("--people", type=int, default=8000)
    parser.add_argument("--pictures", type=int, default=5, help="pictures of each person")
    parser.add_argument("--pairs", type=int, default=64, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    people, pictures = options.people, options.pictures
    start = time.monotonic()
    images = draw(ToyFaces(64, seed=11, n=people * pictures, identities=people))
    held_out = draw(ToyFaces(64, seed=12, n=1000, identities=250))
    print(f"{len(images)} pictures of {people} people drawn in {time.monotonic() - start:.0f} s", flush=True)
    network = ToyFaceEmbedding().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps)
    for step in range(1, options.steps + 1):
        chosen = rng.choice(people, options.pairs, replace=False)
        first = rng.integers(0, pictures, options.pairs)
        second = (first + rng.integers(1, pictures, options.pairs)) % pictures
        indices = np.concatenate([chosen + people * first, chosen + people * second])
        vectors = network(batch(images, indices, rng.random(len(indices)) < 0.5))
        a, b = vectors.chunk(2)
        logits = a @ b.t() / options.temperature  # (pairs, pairs)
        target = torch.arange(options.pairs)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == options.steps:
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in verification(network, held_out, 4).items())
            print(f"step {step}  loss {loss.item():.4f}  {numbers}  {time.monotonic() - start:.0f} s", flush=True)
            origin = {
                "command": "python -m benchmarks.toyfaces.train_identity",
                **{k: v for k, v in vars(options).items() if k != "out"},
            }
            save_embedding(options.out, network.eval(), origin)
            network.train()
    print(options.out)


if __name__ == "__main__":
    main()

"""Check whether a generator can draw the data: how close its best images come, and whether its average latent fits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from psp_lightning.build.instantiate import instantiate
from psp_lightning.data.checks import Finding
from psp_lightning.inference.frozen import freeze_generator
from psp_lightning.inference.optimize import Optimizer
from psp_lightning.lit.callbacks.forecast import duration
from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.models.inversion import Inversion
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.progress import track

CODES = 4096  # random codes for the mean of W
# Limits of PSNR (dB) and of the share of fine detail that is drawn. After 120 steps, the shipped generator has 24.0 and
# 0.22 for its own faces, 21.2 and 0.10 for photographs of faces, 22.6 and 0.05 for upside-down faces, 21.3 and -0.02
# for animals and objects, and 10.8 and 0.00 for noise; an untrained generator has 21.9 and -0.04.
HOPELESS, POOR, ROUGH = 18.0, 23.0, 22.0
NO_DETAIL, LITTLE_DETAIL = 0.05, 0.15
AVERAGE = 0.3  # distance of the average latent from the mean of W, in standard deviations of W
RANGE = (-0.1, 0.5, 5.0)  # of pixels: images in 0..1 stay above the first value, images in 0..255 exceed the last


class TooSlow(UserError):
    """The projection would take longer than the limit."""


@dataclass
class Floor:
    """How close the generator comes to images.

    Attributes:
        psnr: dB for each image.
        detail: share of the fine detail that is drawn, for each image: at most 1, and 0 or less for a blur.
        drawn: (B, 3, S, S), the closest images.
    """

    psnr: list[float]
    detail: list[float]
    drawn: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """The mean PSNR and the mean share of detail."""
        return float(np.mean(self.psnr)), float(np.mean(self.detail))


def load(cfg: DictConfig) -> tuple[Any, Tensor | None]:
    """Build the generator of a configuration; the average latent is None if its file has none."""
    made = instantiate(cfg, "generator")
    return made if isinstance(made, tuple) else (made, None)


@torch.no_grad()
def sample(generator: Any, n: int, seed: int = 0) -> Tensor:
    """Return random codes (n, style_dim) in W."""
    z = np.random.default_rng(seed).standard_normal((n, generator.z_dim), dtype=np.float32)
    return torch.cat([generator.mapping(part) for part in torch.from_numpy(z).split(512)])


@torch.no_grad()
def draw(generator: Any, codes: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return the images (B, 3, S, S) of codes (B, style_dim) or (B, n_styles, style_dim), pooled to `size`."""
    w_plus = codes if codes.dim() == 3 else codes[:, None].expand(-1, generator.n_styles, -1)
    images = torch.cat([generator.synthesis(code[None]) for code in w_plus])
    return images if size is None else F.adaptive_avg_pool2d(images, size)


def measure_floor(
    generator: Any,
    average: Tensor,
    images: Tensor,
    steps: int = 200,
    seconds: float = float("inf"),
    progress: bool = False,
) -> Floor:
    """Optimise codes in W+ for images, from the average latent.

    Args:
        generator: the generator.
        average: (style_dim,) or (n_styles, style_dim).
        images: (B, 3, S, S) in [-1, 1]; the generator's images are pooled to this size.
        steps: number of Adam steps.
        seconds: longest time that the projection may take.
        progress: show a progress bar.

    Raises:
        TooSlow: judging by two steps, it would take longer.
    """
    frozen = freeze_generator(generator)
    start = average.expand(generator.n_styles, -1)[None]
    began = time.monotonic()
    _optimise(frozen, images[:1], start, 2)
    needed = (time.monotonic() - began) / 2 * steps * len(images)
    if needed > seconds:
        raise TooSlow(duration(needed))
    codes = torch.cat(
        [_optimise(frozen, image[None], start, steps) for image in track(images, "drawing", len(images), progress)]
    )
    drawn = draw(generator, codes, (images.shape[-2], images.shape[-1])).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / mse_per_image(drawn, images).clamp(min=1e-8))
    fine = _fine(images)
    detail = 1 - mse_per_image(_fine(drawn), fine) / fine.square().mean((1, 2, 3)).clamp(min=1e-8)
    return Floor(psnr.tolist(), detail.tolist(), drawn)


def _optimise(generator: Any, image: Tensor, start: Tensor, steps: int) -> Tensor:
    return Optimizer(mse_per_image, steps=steps).run(generator, image, Inversion(start)).w_plus


def _fine(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) without what a binomial blur of five pixels keeps."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (taps[:, None] * taps).expand(3, 1, 5, 5)
    return images - F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)


def check_floor(floor: Floor) -> list[Finding]:
    """Report a generator whose closest images are far from the data, or are only a blur of it."""
    psnr, detail = floor.mean
    figures = f"its closest images reach {psnr:.1f} dB PSNR and {max(0.0, detail):.0%} of the fine detail"
    advice = "Look at generator.png. Use a generator that was trained on such images, aligned in the same way."
    if psnr < HOPELESS or (psnr < POOR and detail < NO_DETAIL):
        return [Finding("generator", True, f"this generator cannot draw your data: {figures}", advice)]
    if psnr < ROUGH and detail < LITTLE_DETAIL:
        return [Finding("generator", False, f"this generator draws your data only roughly: {figures}", advice)]
    return []


def check_average(generator: Any, average: Tensor | None) -> list[Finding]:
    """Report an average latent that is not the mean of W, and images in another range of values than [-1, 1]."""
    findings = []
    w = sample(generator, CODES)
    if average is not None:
        distance = float(
            (average.expand(generator.n_styles, -1) - w.mean(0)).norm(dim=1).mean() / w.var(0).sum().sqrt()
        )
        if not distance <= AVERAGE:
            text = (
                f"the average latent in the generator's file lies {distance:.2f} standard deviations from the mean of "
                f"{CODES} codes"
            )
            advice = "It belongs to another generator. Convert the file again with psp-weights import."
            findings.append(Finding("average", True, text, advice))
    images = draw(generator, w[:8]).flatten().numpy()
    low, high = np.quantile(images, [0.01, 0.99])
    darkest, bright, largest = RANGE
    if not np.isfinite(images).all() or max(-low, high) > largest or (low > darkest and high > bright):
        text = f"the generator's images range from {low:.2f} to {high:.2f}, not from -1 to 1"
        advice = "Its images are normalised in another way. Convert it, or scale the weights of its last layers."
        findings.append(Finding("average", True, text, advice))
    return findings


def unusable(error: UserError) -> Finding:
    """Return a fault for a training that cannot be built."""
    return Finding("training", True, f"the training does not start: {str(error).rstrip('.')}", "")

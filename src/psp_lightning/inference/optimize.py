"""Find codes of images by optimisation: a slow alternative to an encoder, or a refinement of its codes.

Source: Abdal et al., Image2StyleGAN (arXiv:1904.03189), with the learning-rate schedule of StyleGAN2
(arXiv:1912.04958), appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.models.protocols import Generator
from psp_lightning.models.psp import PSP
from psp_lightning.utils.arguments import choice, number, whole

Distance = Callable[[Tensor, Tensor], Tensor]


class Optimizer:
    """Adam on the codes of images; each image is optimised independently.

    Args:
        distance: maps (y_hat, y), both (B, C, S, S) in about [-1, 1], to (B,), or to its sum.
        space: `w_plus` (a style for each layer) or `w` (one style for all layers).
        start: `encoder` (the codes of the network) or `average` (the average latent).
        steps: number of Adam steps.
        lr: highest learning rate; it rises over the first 5 % of the steps and falls to zero over the last 25 %.

    Raises:
        ArgumentError: `space` or `start` is unknown, or a number is out of range.
    """

    def __init__(
        self, distance: Distance, space: str = "w_plus", start: str = "encoder", steps: int = 500, lr: float = 0.1
    ) -> None:
        self.distance = distance
        self.space, self.start = choice("space", space, ("w_plus", "w")), choice("start", start, ("encoder", "average"))
        self.steps, self.lr = whole("steps", steps, 1), number("lr", lr, 0)

    def __call__(self, net: PSP, w_plus: Tensor, images: Tensor) -> Tensor:
        """Return codes (B, n_styles, style_dim) whose images are close to `images`, detached.

        Args:
            net: the network, which is not changed.
            w_plus: (B, n_styles, style_dim), the encoder's codes.
            images: (B, C, S, S) in [-1, 1]; the generator's images are pooled to this size.
        """
        start = w_plus if self.start == "encoder" else net.latent_avg.expand_as(w_plus)
        return self.run(net.generator, images, start)

    def run(self, generator: Generator, images: Tensor, start: Tensor) -> Tensor:
        """Optimise from `start` (B, n_styles, style_dim); for space w, from the mean of its styles."""
        n_styles, size = start.shape[1], (images.shape[-2], images.shape[-1])
        codes = (start.mean(1, keepdim=True) if self.space == "w" else start).detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([codes], lr=self.lr, betas=(0.9, 0.999))
        with torch.enable_grad():
            for step in range(self.steps):
                t = step / self.steps
                fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
                optimizer.param_groups[0]["lr"] = self.lr * fall * min(1.0, (t + 1 / self.steps) / 0.05)
                y_hat = generator.synthesis(codes.expand(-1, n_styles, -1))
                if tuple(y_hat.shape[-2:]) != size:
                    y_hat = F.adaptive_avg_pool2d(y_hat, size)
                loss = self.distance(y_hat, images).sum()
                (codes.grad,) = torch.autograd.grad(loss, codes)  # computes no gradients of the weights
                optimizer.step()
        return codes.detach().expand(-1, n_styles, -1)

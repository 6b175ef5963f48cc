"""Inversion of images by optimisation: a slow alternative to an encoder, or a refinement of its result.

Sources: Abdal et al., Image2StyleGAN (arXiv:1904.03189), with the learning-rate schedule of StyleGAN2
(arXiv:1912.04958), appendix D, for codes; Roich et al., PTI (arXiv:2106.05744), for weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from psp_lightning.models.encoders import IMAGE_CHANNELS
from psp_lightning.models.inversion import Inversion, synthesise
from psp_lightning.models.protocols import GeneratorModule
from psp_lightning.models.psp import PSP
from psp_lightning.utils.arguments import ArgumentError, choice, number, whole
from psp_lightning.utils.errors import UserError

Distance = Callable[[Tensor, Tensor], Tensor]

LEARNING_RATES = {"w_plus": 0.1, "w": 0.1, "features": 0.05, "weights": 1e-3}
LOCALITY = 0.1  # the published weight
STARTS = ("encoder", "average", "features")
RADIUS, PUBLISHED = 30.0, 18 * 512  # distance in the locality term of PTI, and how many numbers its codes have


class Optimizer:
    """Adam on the codes of images, on a change of a feature map, or on the weights of the generator.

    Each image is optimised independently of the others of its batch, up to rounding, which many steps amplify.

    Args:
        distance: function that maps (y_hat, y), both (B, C, S, S) in about [-1, 1], to (B,) or to the sum over B.
        space: what is optimised: `w_plus` (a style for each layer), `w` (one style for all layers), `features` (a
            change of the feature map of side `resolution`), or `weights` (the generator's weights, a copy for each
            image).
        start: first result: `encoder` (the codes of the network), `average` (the average latent), or `features` (the
            codes and the change that the network's refiner adds).
        steps: number of Adam steps.
        seconds: time limit for a batch, which ends after one step at the earliest; None: no limit. With a limit, the
            result depends on the speed of the machine.
        lr: highest learning rate; it rises over the first 5 % of the steps and falls to zero over the last 25 %. None:
            0.1 for codes, 0.05 for features, 0.001 for weights.
        resolution: side of the feature map, for `features`; None: the refiner's, otherwise a sixteenth of the image, at
            least 16.
        locality: weight of the term that keeps other images as they are, for `weights`; 0 leaves the term out. None:
            0.1.
        seed: seed of the random images in this term.

    Attributes:
        on_step: function that is called with the number of finished steps and the number of all steps of a batch.

    Raises:
        ArgumentError: `space` or `start` is unknown, a number is out of range, or `resolution` or `locality` is given
            for a space that does not use it.
    """

    def __init__(
        self,
        distance: Distance,
        space: str = "w_plus",
        start: str = "encoder",
        steps: int = 500,
        seconds: float | None = None,
        lr: float | None = None,
        resolution: int | None = None,
        locality: float | None = None,
        seed: int = 0,
    ) -> None:
        self.distance = distance
        self.space, self.start = choice("space", space, tuple(LEARNING_RATES)), choice("start", start, STARTS)
        self.steps, self.lr = whole("steps", steps, 1), number("lr", LEARNING_RATES[space] if lr is None else lr, 0)
        self.seconds = None if seconds is None else number("seconds", seconds, 0)
        for name, value in (("seconds", self.seconds), ("lr", self.lr)):
            if value == 0:
                raise ArgumentError(name, value, "must be more than 0.")
        self.resolution = whole("resolution", resolution, 4, optional=True)
        self.locality = number("locality", LOCALITY if locality is None else locality, 0)
        self.seed = whole("seed", seed, 0)
        for name, value, user in (("resolution", resolution, "features"), ("locality", locality, "weights")):
            if value is not None and space != user:
                raise ArgumentError(name, value, f"has no effect with space={space}, only with space={user}.")
        self.on_step: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, net: PSP, inversion: Inversion, images: Tensor) -> Inversion:
        """Return an inversion whose images are close to `images`, detached.

        Args:
            net: network; it is not changed.
            inversion: the network's inversion of the images, with codes (B, n_styles, style_dim).
            images: images (B, 3, S, S) in [-1, 1]; the generator's images are pooled to this size.

        Raises:
            UserError: the inversion has no features to start from, the images have another shape or values that are
                not finite, or `torch.inference_mode` is on.
            ArgumentError: the generator has no feature map of this resolution, or the features have another.
        """
        if torch.is_inference_mode_enabled():
            raise UserError("Nothing can be optimised in torch.inference_mode(). Use torch.no_grad() instead.")
        if images.ndim != 4 or len(images) != len(inversion) or images.shape[1] != IMAGE_CHANNELS:
            raise UserError(
                f"The images have the shape {tuple(images.shape)}; for this inversion, it must be "
                f"({len(inversion)}, {IMAGE_CHANNELS}, S, S)."
            )
        for name, values in (("images", images), ("codes", inversion.w_plus)):
            if not bool(values.isfinite().all()):
                raise UserError(f"Some values of the {name} are not finite, so nothing can be optimised.")
        if self.start == "features" and inversion.features is None:
            raise UserError(
                "start=features needs an inversion with features, as net.invert returns for a network with a refiner. "
                "Use start=encoder."
            )
        if self.start == "average":
            inversion = Inversion(net.latent_avg.expand_as(inversion.w_plus))
        elif self.start == "encoder":
            inversion = Inversion(inversion.w_plus)
        # a copy, because tensors made in torch.inference_mode cannot be part of a graph
        inversion = replace(inversion, w_plus=inversion.w_plus.detach().clone())
        if self.space == "features":
            inversion = replace(inversion, features=self._features(net, inversion))
        return self.run(net.generator, images, inversion)

    def side(self, net: PSP) -> int:
        """Return the side of the feature map that is optimised.

        Raises:
            ArgumentError: the generator has no such map, or the refiner changes another one.
            UserError: the generator has no maps.
        """
        size: int = net.generator.output_size
        side: int = self.resolution or getattr(net.refiner, "resolution", max(16, size // 16))
        maps = getattr(net.generator, "feature_channels", {})
        if not maps:
            raise UserError(
                f"space=features needs a generator with feature maps; {type(net.generator).__name__} has none."
            )
        if side not in maps:
            raise ArgumentError("resolution", side, f"must be one of the generator's: {', '.join(map(str, maps))}.")
        refined = getattr(net.refiner, "resolution", side) if self.start == "features" else side
        if side != refined:
            raise ArgumentError("resolution", side, f"must be the refiner's, {refined}, with start=features.")
        return side

    def _features(self, net: PSP, inversion: Inversion) -> Tensor:
        side = self.side(net)
        shape = (len(inversion), net.generator.feature_channels[side], side, side)
        if inversion.features is None:
            return inversion.w_plus.new_zeros(shape)
        if tuple(inversion.features.shape) != shape:
            rule = f"must be the refiner's, {inversion.features.shape[-1]}, with start=features."
            raise ArgumentError("resolution", side, rule)
        return inversion.features.detach().to(torch.promote_types(inversion.features.dtype, torch.float32))

    def run(self, generator: GeneratorModule, images: Tensor, start: Inversion) -> Inversion:
        """Return an optimised inversion. It starts from `start`, or for space `w` from the mean of its styles."""
        if self.space == "weights":
            share = None if self.seconds is None else self.seconds / len(images)
            total = self.steps * len(images)
            parts = []
            for i in range(len(images)):
                done = (i * self.steps, total)
                parts.append(self._tune(generator, images[i : i + 1], start[i], share, done))
            return replace(start, weights=tuple(parts))
        w_plus, n_styles = start.w_plus, start.w_plus.shape[1]
        first = start.features if self.space == "features" else w_plus
        assert first is not None
        leaf = (first.mean(1, keepdim=True) if self.space == "w" else first).detach().clone().requires_grad_()

        def current() -> Inversion:
            if self.space == "features":
                return replace(start, features=leaf)
            return replace(start, w_plus=leaf.expand(-1, n_styles, -1))

        self._descend([leaf], lambda: self._loss(synthesise(generator, current()), images), self.seconds)
        leaf.requires_grad_(False)
        return current()

    def _tune(
        self, generator: GeneratorModule, image: Tensor, start: Inversion, seconds: float | None, done: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return differences of the weights for one image: pivotal tuning with the locality term.

        Source: PTI (arXiv:2106.05744), equations 2 to 5.
        """
        weights = {
            name: torch.zeros_like(parameter, requires_grad=True) for name, parameter in generator.named_parameters()
        }
        draws = torch.Generator().manual_seed(self.seed)  # the same for each image

        def loss() -> Tensor:
            total = self._loss(synthesise(generator, replace(start, weights=(weights,))), image)
            if self.locality:
                near = Inversion(self._near(generator, start.w_plus, draws))
                with torch.no_grad():
                    before = synthesise(generator, near)
                after = synthesise(generator, replace(near, weights=(weights,)))
                total = total + self.locality * self.distance(after, before).sum()
            return total

        self._descend(list(weights.values()), loss, seconds, done)
        # the weights of the mapping network have no gradients
        return {name: value.detach() for name, value in weights.items() if value.grad is not None}

    @staticmethod
    def _near(generator: GeneratorModule, pivot: Tensor, draws: torch.Generator) -> Tensor:
        """Return codes at a fixed distance from the pivot, in the direction of a random code."""
        z = torch.randn(1, generator.z_dim, generator=draws).to(pivot)
        with torch.no_grad():
            way = generator.mapping(z)[:, None] - pivot
        radius = RADIUS * math.sqrt(pivot.numel() / PUBLISHED)
        return pivot + radius * way / way.norm().clamp_min(1e-8)

    def _loss(self, y_hat: Tensor, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if tuple(y_hat.shape[-2:]) != size:
            y_hat = F.adaptive_avg_pool2d(y_hat, size)
        return self.distance(y_hat, images).sum()

    def _descend(
        self,
        leaves: Sequence[Tensor],
        loss: Callable[[], Tensor],
        seconds: float | None,
        done: tuple[int, int] | None = None,
    ) -> None:
        """Change the leaves in place until all steps are done or the time is over.

        `done` is for `on_step`: the number of steps that were finished before, and the number of steps of the batch.
        """
        before, total = done or (0, self.steps)
        optimizer = torch.optim.Adam(leaves, lr=self.lr, betas=(0.9, 0.999))
        begin = time.monotonic()
        with torch.enable_grad():
            for step in range(self.steps):
                t = step / self.steps
                if seconds is not None and step:
                    t = max(t, (time.monotonic() - begin) / seconds)
                    if t >= 1:
                        break
                fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25))
                optimizer.param_groups[0]["lr"] = self.lr * fall * min(1.0, (t + 1 / self.steps) / 0.05)
                # unlike backward(), this computes no gradients for other weights
                gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                optimizer.step()
                if seconds is not None and leaves[0].is_cuda:
                    torch.cuda.synchronize(leaves[0].device)  # the clock counts finished steps
                self.on_step(before + step + 1, total)

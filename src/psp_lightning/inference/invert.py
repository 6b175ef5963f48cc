"""Inversion in two steps that combine freely: embed an image, then refine the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from psp_lightning.inference.optimize import Optimizer
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import UserError

Step = Callable[[PSP, Inversion, Tensor, Tensor], Inversion]  # (network, inversion so far, source, target)


def keep_codes(net: PSP, inversion: Inversion, source: Tensor, target: Tensor) -> Inversion:
    """Return only the codes, without any refinement."""
    return Inversion(inversion.w_plus)


def refine_features(net: PSP, inversion: Inversion, source: Tensor, target: Tensor) -> Inversion:
    """Return the inversion with the change that the network's refiner computes from the source.

    Raises:
        UserError: the network has no refiner.
    """
    check_refiner(net)
    return refine_if_possible(net, inversion, source, target)


def refine_if_possible(net: PSP, inversion: Inversion, source: Tensor, target: Tensor) -> Inversion:
    """Return the inversion with the change that the network's refiner computes; without a refiner, add no change."""
    return replace(inversion, features=net.refine(source, inversion.w_plus))


def check_refiner(net: PSP) -> None:
    """Raise a UserError for a network without a refiner."""
    if net.refiner is None:
        raise UserError(
            "refine=features and start=features need a network that was trained with refiner=features; this network "
            "has no refiner."
        )


class Optimization(nn.Module):
    """A step that optimises an inversion towards the target.

    Args:
        distance: module that maps (y_hat, y) to a loss, summed over the images; it is moved with this module.
        make: function that builds the method from `distance`, such as `functools.partial(Optimizer, steps=100)`.
    """

    def __init__(self, distance: nn.Module, make: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.distance = distance
        self.method = make(distance=distance)

    def forward(self, net: PSP, inversion: Inversion, source: Tensor, target: Tensor) -> Inversion:
        """Return an inversion whose images are closer to `target` (B, 3, S, S)."""
        if self.method.start == "features":
            inversion = refine_features(net, inversion, source, target)
        return self.method(net, inversion, target)


class Inverter(nn.Module):
    """Map sources to inversions with a network: its encoder, and the steps that follow.

    Args:
        embed: step that changes the encoder's codes; None keeps them.
        refine: step that refines the result.
    """

    def __init__(self, embed: Step | None = None, refine: Step = refine_if_possible) -> None:
        super().__init__()
        self.embed, self.refine = embed, refine

    def optimizers(self) -> Iterator[Optimizer]:
        """Yield the methods that optimise, in the order of the steps."""
        for step in (self.embed, self.refine):
            if isinstance(step, Optimization):
                yield step.method

    def check(self, net: PSP) -> None:
        """Check whether the network can take these steps.

        Raises:
            UserError: a step needs a refiner, and the network has none.
            ArgumentError: the generator has no feature map of the resolution that is to be optimised.
        """
        methods = list(self.optimizers())
        step = self.refine.func if isinstance(self.refine, partial) else self.refine
        if step is refine_features or any(method.start == "features" for method in methods):
            check_refiner(net)
        for method in methods:
            if method.space == "features":
                method.side(net)

    @property
    def needs_encoder(self) -> bool:
        """Whether the codes of the encoder are used: they are not if the first step starts from the average latent."""
        first = self.refine if self.embed is None else self.embed
        return not (isinstance(first, Optimization) and first.method.start == "average")

    def forward(self, net: PSP, source: Tensor, target: Tensor) -> Inversion:
        """Return the inversion of a batch.

        Args:
            net: network.
            source: sources (B, C, input_size, input_size).
            target: images to be reproduced, (B, 3, S, S) in [-1, 1]; only optimisation uses them.
        """
        codes = net.encode(source) if self.needs_encoder else net.latent_avg.expand(len(source), -1, -1)
        inversion = Inversion(codes)
        if self.embed is not None:
            inversion = self.embed(net, inversion, source, target)
        return self.refine(net, inversion, source, target)

"""The representation of an image in a generator: codes, and optionally what the codes cannot express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.errors import UserError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Inversion:
    """Codes, and optionally a change of one feature map or of the weights of the generator.

    Attributes:
        w_plus: codes (B, n_styles, style_dim).
        features: change (B, channels, r, r), added to the generator's feature map of side r; None changes nothing.
        weights: differences for each image, by the name of the generator's parameter. They are added to the parameters
            while this image is decoded; the generator itself is not modified. None changes nothing.
    """

    w_plus: Tensor
    features: Tensor | None = None
    weights: tuple[Weights, ...] | None = None

    def cpu(self) -> Inversion:
        """Return a copy on the CPU, in float32."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().float().cpu()

        features = None if self.features is None else moved(self.features)
        weights = self.weights and tuple({name: moved(part) for name, part in one.items()} for one in self.weights)
        return Inversion(moved(self.w_plus), features, weights)

    def interpolate(self, other: Inversion, alpha: float) -> Inversion:
        """Return an inversion between this one (`alpha` 0) and another one (1), for the same generator.

        Codes, features and weights are interpolated linearly. What one of the two lacks counts as zero.

        Raises:
            UserError: the numbers of images, or the shapes of codes or features, differ.
        """
        for name, a, b in (("codes", self.w_plus, other.w_plus), ("features", self.features, other.features)):
            if a is not None and b is not None and a.shape != b.shape:
                raise UserError(f"The {name} have the shapes {tuple(a.shape)} and {tuple(b.shape)}, which must agree.")

        def between(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            parts = [share * part for share, part in ((1 - alpha, a), (alpha, b)) if part is not None]
            return sum(parts[1:], parts[0]) if parts else None

        w_plus = between(self.w_plus, other.w_plus)
        assert w_plus is not None
        weights = None
        if self.weights is not None or other.weights is not None:
            pairs = zip(self.weights or ({},) * len(self), other.weights or ({},) * len(other), strict=True)
            weights = tuple(
                {name: part for name in {**a, **b} if (part := between(a.get(name), b.get(name))) is not None}
                for a, b in pairs
            )
        return Inversion(w_plus, between(self.features, other.features), weights)

    def __len__(self) -> int:
        return len(self.w_plus)

    def __getitem__(self, index: int) -> Inversion:
        """Return the inversion of one image, as a batch of one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of an inversion of {len(self)}")
        part = slice(index, index + 1 or None)
        features = None if self.features is None else self.features[part]
        return Inversion(self.w_plus[part], features, None if self.weights is None else self.weights[part])


class Synthesis(nn.Module):
    """A generator whose `forward` is its synthesis, for functions that call a module, such as `functional_call`."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator: Any = generator

    def forward(self, *arguments: Any) -> Tensor:
        """Return `generator.synthesis(*arguments)`."""
        return self.generator.synthesis(*arguments)


def synthesise(generator: nn.Module, inversion: Inversion, noise: Noise = "const") -> Tensor:
    """Map an inversion to images (B, 3, output_size, output_size), about [-1, 1], not clamped.

    Args:
        generator: a `models.protocols.Generator`; for an inversion with features, a `FeatureGenerator`. It is not
            modified.
        inversion: codes of the images, and what refines them.
        noise: see `Generator.synthesis`.

    Raises:
        UserError: the features or weights belong to another generator.
    """
    if inversion.weights is None:
        return generator.synthesis(*_arguments(generator, inversion, noise))  # type: ignore[operator]
    if len(inversion.weights) != len(inversion):
        raise UserError(f"The inversion has weights for {len(inversion.weights)} of {len(inversion)} images.")
    images = []
    parameters = dict(generator.named_parameters())
    for i, weights in enumerate(inversion.weights):
        own = noise if isinstance(noise, str) else [part[i : i + 1] if len(part) > 1 else part for part in noise]
        changed = {f"generator.{name}": _add(parameters, name, difference) for name, difference in weights.items()}
        arguments = _arguments(generator, inversion[i], own)
        images.append(functional_call(Synthesis(generator), changed, arguments))
    return torch.cat(images)


def _add(parameters: Mapping[str, Tensor], name: str, difference: Tensor) -> Tensor:
    parameter = parameters.get(name)
    if parameter is None or parameter.shape != difference.shape:
        found = "no such weight" if parameter is None else f"shape {tuple(parameter.shape)}"
        raise UserError(
            f"The inversion changes the weight {name} of shape {tuple(difference.shape)}, but this generator has "
            f"{found}. The inversion belongs to another generator."
        )
    return parameter + difference.to(parameter)


def _arguments(generator: Any, inversion: Inversion, noise: Noise | Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the arguments of `synthesis`; generators without feature maps take only two."""
    change = inversion.features
    if change is None:
        return inversion.w_plus, noise
    side = change.shape[-1]
    expected = (getattr(generator, "feature_channels", {}).get(side), side, side)
    if len(change) != len(inversion) and not torch.jit.is_tracing():
        raise UserError(f"The inversion has features for {len(change)} of {len(inversion)} images.")
    if tuple(change.shape[1:]) != expected and not torch.jit.is_tracing():
        raise UserError(
            f"The inversion has features of shape {tuple(change.shape)}, but this generator has "
            f"{expected[0] or 'no'} channels at {side} px."
        )

    def add(resolution: int, features: Tensor) -> Tensor:
        return features + change.to(features.dtype) if resolution == side else features

    return inversion.w_plus, noise, add

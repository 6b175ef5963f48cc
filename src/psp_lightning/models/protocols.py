"""Interfaces of the networks that users can replace.

A custom network is an `nn.Module` with these members and does not derive from these classes. `EncoderModule` and
`GeneratorModule` exist for type checkers, which have no other way to express "a module with this interface".
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from psp_lightning.models.stylegan2 import FeatureEdit, Noise


class Encoder(Protocol):
    """A network from sources to codes, registered with `register_encoder`.

    If it has `n_styles` and `style_dim`, they must be equal to the generator's.

    Attributes:
        config: plain values that rebuild it, `cls(**config)`; `record_config` collects them.
        in_channels: channels of the source.
        input_size: side of the source.
    """

    config: dict[str, Any]
    in_channels: int
    input_size: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, input_size, input_size) to codes relative to the average latent.

        The codes are (B, n_styles, style_dim), or (B, style_dim) to use one style for all layers.
        """


class RefiningEncoder(Encoder, Protocol):
    """An encoder that refines its codes in several passes; see `PSP.encode_delta`.

    Attributes:
        iterations: number of passes; `PSP` calls an encoder without it, or with 0, as an `Encoder`.
    """

    iterations: int

    def __call__(self, x: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return the update (B, n_styles, style_dim) of the codes so far.

        Args:
            x: the source.
            image: the image of the codes so far, (B or 1, 3, output_size, output_size).
        """


class Generator(Protocol):
    """A network from codes to images, registered with `register_generator`.

    Attributes:
        config: plain values that rebuild it, `cls(**config)`; `record_config` collects them.
        output_size: side of the image.
        n_styles: styles of an image.
        style_dim: length of a style.
        z_dim: length of z.
    """

    config: dict[str, Any]
    output_size: int
    n_styles: int
    style_dim: int
    z_dim: int

    def mapping(self, z: Tensor) -> Tensor:
        """Map z (B, z_dim), standard normal, to w (B, style_dim)."""

    def synthesis(self, w_plus: Tensor, noise: Noise = "const") -> Tensor:
        """Map w_plus (B, n_styles, style_dim) to unclamped images (B, 3, output_size, output_size), about [-1, 1]."""

    def latent_average(self, n: int = 100_000, seed: int = 0) -> Tensor:
        """Return the mean w (style_dim,) of `n` draws of z."""


class FeatureGenerator(Generator, Protocol):
    """A generator whose feature maps can be changed, which a refiner needs.

    Attributes:
        feature_channels: channels of the feature map of each resolution.
    """

    feature_channels: dict[int, int]

    def synthesis(self, w_plus: Tensor, noise: Noise = "const", features: FeatureEdit | None = None) -> Tensor:
        """Map codes to images; see `Generator.synthesis` in `models/stylegan2.py`."""


class Refiner(Protocol):
    """A network that adds to a feature map of the generator, registered with `register_refiner`.

    Attributes:
        config: plain values that rebuild it, `cls(**config)`; `record_config` collects them.
        resolution: side of the feature map.
        channels: channels of the feature map.
        input_size: side of the source.
    """

    config: dict[str, Any]
    resolution: int
    channels: int
    input_size: int

    def __call__(self, x: Tensor, first: Tensor, features: Tensor) -> Tensor:
        """Return what to add to the map, (B, channels, resolution, resolution).

        Args:
            x: (B, 3, input_size, input_size), the source.
            first: the same shape, the image of the codes.
            features: (B, channels, resolution, resolution), the generator's map for the codes.
        """


class Embedding(Protocol):
    """A network from images to unit vectors, registered with `register_embedding`.

    Attributes:
        config: plain values that rebuild it, `cls(**config)`; `record_config` collects them.
    """

    config: dict[str, Any]

    def __call__(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to unit vectors (B, D)."""

    def features(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) in [-1, 1] to the feature maps (B, C, h, w) of the stages."""


class EncoderModule(nn.Module, Encoder):
    """The type of `PSP.encoder`."""


class GeneratorModule(nn.Module, FeatureGenerator):
    """The type of `PSP.generator`."""


class RefinerModule(nn.Module, Refiner):
    """The type of `PSP.refiner`."""

"""pSp: an encoder followed by a frozen generator.

Source: Richardson et al., pSp (arXiv:2008.00951), section 3: `pSp(x) = G(E(x) + w_average)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import psp_lightning.models.encoders  # noqa: F401  fills the registry that from_description reads
import psp_lightning.models.refiner  # noqa: F401
from psp_lightning.models.inversion import Inversion, synthesise
from psp_lightning.models.layers import freeze
from psp_lightning.models.protocols import EncoderModule, GeneratorModule, RefinerModule
from psp_lightning.models.registry import build_described
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.arguments import ArgumentError
from psp_lightning.utils.errors import UserError

FORMAT = 1


class PSP(nn.Module):
    """An encoder, a frozen generator and an average latent, and optionally a refiner.

    Args:
        encoder: see `models.protocols.Encoder` and `RefiningEncoder`.
        generator: see `models.protocols.Generator`; it is frozen in place.
        latent_avg: average latent, (style_dim,) or (n_styles, style_dim); None means zeros.
        start_from_latent_avg: add the average latent to the codes of the encoder.
        source: description of the source as plain values (`InputSpec.to_dict()`); it is only stored.
        refiner: see `models.protocols.Refiner`; the generator must be a `FeatureGenerator`. Only the shapes are
            compared: a refiner that was trained for another generator of these shapes is accepted, but the images are
            wrong.

    Attributes:
        latent_avg: buffer (n_styles, style_dim).

    Raises:
        UserError: encoder, generator, average latent or refiner do not fit together.
    """

    encoder: EncoderModule
    generator: GeneratorModule
    refiner: RefinerModule | None
    latent_avg: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        generator: nn.Module,
        latent_avg: Tensor | None = None,
        start_from_latent_avg: bool = True,
        source: Mapping[str, Any] | None = None,
        refiner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = cast(EncoderModule, encoder)
        self.generator = cast(GeneratorModule, freeze(generator))
        self.n_styles, self.style_dim = self.generator.n_styles, self.generator.style_dim
        self.start_from_latent_avg = bool(start_from_latent_avg)
        self.source: dict[str, Any] = dict(source or {})
        for name, wanted in (("style_dim", self.style_dim), ("n_styles", self.n_styles)):
            given = getattr(encoder, name, wanted)
            if given != wanted:
                raise UserError(
                    f"{type(encoder).__name__} has {name}={given}, but the {self.generator.output_size} px generator "
                    f"needs {name}={wanted}."
                )
        average = torch.zeros(self.style_dim) if latent_avg is None else latent_avg.detach()
        if tuple(average.shape) not in ((self.style_dim,), (1, self.style_dim), (self.n_styles, self.style_dim)):
            raise UserError(
                f"latent_avg of shape {tuple(average.shape)}: expected ({self.style_dim},) or "
                f"({self.n_styles}, {self.style_dim})."
            )
        self.register_buffer("latent_avg", average.expand(self.n_styles, -1).clone())
        self.refiner = cast("RefinerModule | None", refiner)
        if self.refiner is not None:
            self._check_refiner(self.refiner)

    def _check_refiner(self, refiner: RefinerModule) -> None:
        maps = getattr(self.generator, "feature_channels", {})
        if maps.get(refiner.resolution) != refiner.channels:
            known = ", ".join(f"{channels} at {side}" for side, channels in maps.items())
            raise UserError(
                f"The refiner changes a feature map of {refiner.channels} channels at {refiner.resolution} px, but the "
                f"generator has {known or 'no maps that can be changed'}. It belongs to another generator."
            )
        if (found := getattr(self.encoder, "in_channels", 3)) != 3:
            raise UserError(f"A refiner compares the source with an RGB image, but the source has {found} channels.")
        if (side := getattr(self.encoder, "input_size", refiner.input_size)) != refiner.input_size:
            raise UserError(
                f"The refiner takes sources of {refiner.input_size} px, but the encoder takes {side} px. Build it with "
                f"input_size={side}."
            )

    @property
    def passes(self) -> int:
        """The number of passes of an encoder that refines its codes; 0 for an encoder that only sees the source."""
        return getattr(self.encoder, "iterations", 0)

    def encode_delta(self, x: Tensor) -> Tensor:
        """Map a source (B, C, input_size, input_size) to codes (B, n_styles, style_dim), without the average latent.

        A `RefiningEncoder` is called once per pass with the source and the image of the codes so far (at first, of the
        average latent), and its results are summed. Gradients flow through the codes of all passes, not through the
        images.

        Raises:
            UserError: the source does not have the shape that the encoder was built for, or the codes have a wrong
                shape.

        Source of the passes: Alaluf et al., ReStyle (arXiv:2104.02699), section 3.
        """
        if not self.passes:
            delta = self.encoder(x)
            self._check_codes(delta)
            return delta if delta.ndim == 3 else delta.unsqueeze(1).expand(-1, self.n_styles, -1)
        delta = self.latent_avg.new_zeros(1, self.n_styles, self.style_dim)
        for _ in range(self.passes):
            with torch.no_grad():
                image = self.decode(self._add_average(delta))
            delta = delta + self.encoder(x, image)
        return delta

    def _check_codes(self, codes: Tensor) -> None:
        shapes = ((self.n_styles, self.style_dim), (self.style_dim,))
        if torch.jit.is_tracing() or codes.shape[1:] in shapes:
            return
        raise UserError(
            f"{type(self.encoder).__name__} returned codes of shape {tuple(codes.shape)}: expected (B, "
            f"{self.n_styles}, {self.style_dim}), or (B, {self.style_dim}) for one style in all layers."
        )

    def encode(self, x: Tensor) -> Tensor:
        """Map a source (B, C, input_size, input_size) to w_plus (B, n_styles, style_dim), see `encode_delta`."""
        return self._add_average(self.encode_delta(x))

    def _add_average(self, delta: Tensor) -> Tensor:
        return delta + self.latent_avg if self.start_from_latent_avg else delta

    def refine(self, x: Tensor, w_plus: Tensor) -> Tensor | None:
        """Return what the refiner adds to its feature map, (B, channels, r, r); None without a refiner.

        Args:
            x: source (B, 3, input_size, input_size).
            w_plus: codes of the source, (B, n_styles, style_dim). No gradient flows into them.
        """
        if (refiner := self.refiner) is None:
            return None
        kept: list[Tensor] = []

        def keep(resolution: int, features: Tensor) -> Tensor:
            if resolution == refiner.resolution:
                kept.append(features)
            return features

        with torch.no_grad():
            first = self.generator.synthesis(w_plus, features=keep)
            first = F.adaptive_avg_pool2d(first, (x.shape[-2], x.shape[-1]))
        return refiner(x, first, kept[0])

    def invert(self, x: Tensor) -> Inversion:
        """Map a source (B, C, input_size, input_size) to codes and, with a refiner, the change of its feature map."""
        w_plus = self.encode(x)
        return Inversion(w_plus, self.refine(x, w_plus))

    def decode(self, codes: Tensor | Inversion, noise: Noise = "const") -> Tensor:
        """Map codes to images (B, 3, output_size, output_size), about [-1, 1], not clamped.

        Args:
            codes: w_plus (B, n_styles, style_dim), or an inversion.
            noise: see `Generator.synthesis`.

        Raises:
            UserError: the inversion belongs to another generator.
        """
        inversion = Inversion(codes) if isinstance(codes, Tensor) else codes
        return synthesise(self.generator, inversion, noise)

    def forward(self, x: Tensor) -> Tensor:
        """Map a source to an image, `decode(invert(x))`."""
        return self.decode(self.invert(x))

    @overload
    def mix_styles(
        self, w_plus: Tensor, inject: Tensor | Inversion | None, latent_mask: Iterable[int], alpha: float = 1.0
    ) -> Tensor: ...

    @overload
    def mix_styles(
        self, w_plus: Inversion, inject: Tensor | Inversion | None, latent_mask: Iterable[int], alpha: float = 1.0
    ) -> Inversion: ...

    def mix_styles(
        self,
        w_plus: Tensor | Inversion,
        inject: Tensor | Inversion | None,
        latent_mask: Iterable[int],
        alpha: float = 1.0,
    ) -> Tensor | Inversion:
        """Return the codes with some styles replaced, (B, n_styles, style_dim), or an inversion with such codes.

        Args:
            w_plus: codes (B, n_styles, style_dim), or an inversion, which keeps its features; it is not modified.
            inject: new styles, (B or 1, style_dim) or (B or 1, n_styles, style_dim), or an inversion, whose codes are
                used without its features; None sets the styles to zero.
            latent_mask: indices of the styles to replace, 0 (coarsest) to n_styles - 1.
            alpha: the styles become `alpha * inject + (1 - alpha) * w_plus`.

        Raises:
            UserError: an index is out of range, or a shape does not match.

        Source: pSp (arXiv:2008.00951), section 4.5 (multi-modal synthesis by style mixing).
        """
        inject = inject.w_plus if isinstance(inject, Inversion) else inject
        if isinstance(w_plus, Inversion):
            return replace(w_plus, w_plus=self.mix_styles(w_plus.w_plus, inject, latent_mask, alpha))
        indices = [int(i) for i in latent_mask]
        for i in indices:
            if not 0 <= i < self.n_styles:
                rule = f"must contain styles from 0 to {self.n_styles - 1}: there is no style {i}."
                raise ArgumentError("latent_mask", indices, rule)
        mixed = w_plus.clone()
        if inject is None:
            mixed[:, indices] = 0
            return mixed
        if inject.ndim == 2:
            inject = inject.unsqueeze(1).expand(-1, self.n_styles, -1)
        if inject.shape[1:] != w_plus.shape[1:] or inject.shape[0] not in (1, w_plus.shape[0]):
            raise UserError(
                f"inject of shape {tuple(inject.shape)} does not match codes {tuple(w_plus.shape)}: give "
                f"({w_plus.shape[0]} or 1, {self.style_dim}) or ({w_plus.shape[0]} or 1, {self.n_styles}, "
                f"{self.style_dim})."
            )
        mixed[:, indices] = (alpha * inject + (1 - alpha) * w_plus)[:, indices].to(mixed.dtype)
        return mixed

    def for_inference(self, dtype: torch.dtype = torch.float32, pack: bool = True) -> PSP:
        """Return a copy that encodes and decodes faster, but cannot be trained, moved or saved.

        Args:
            dtype: float32 (results agree with this network to 1e-4 of their largest value) or bfloat16 (used by the
                encoder, and by the generator from 16 px; for images in [-1, 1] the mean difference is below 2/255).
                Codes and images are float32 in both cases.
            pack: see `FusedEncoder`.

        Raises:
            UserError: `dtype` is neither of them.
        """
        from psp_lightning.inference.fused import for_inference

        return for_inference(self, dtype, pack)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which `from_description` rebuilds this network without its weights."""
        described = {
            "format": FORMAT,
            "encoder": {"class": type(self.encoder).__name__, **self.encoder.config},
            "generator": {"class": type(self.generator).__name__, **self.generator.config},
            "start_from_latent_avg": self.start_from_latent_avg,
            "source": dict(self.source),
        }
        if self.refiner is not None:
            described["refiner"] = {"class": type(self.refiner).__name__, **self.refiner.config}
        return described

    @classmethod
    def from_description(cls, description: Mapping[str, Any], generator: nn.Module | None = None) -> PSP:
        """Build a network from a description, with new weights and a zero average.

        Args:
            description: see `describe`. Its classes are looked up in the registries; nothing is imported.
            generator: used instead of the described generator, which is then ignored.

        Raises:
            UserError: the description has another format, names an unknown class, or has wrong arguments.
        """
        found = description.get("format") if isinstance(description, Mapping) else type(description).__name__
        if found != FORMAT:
            raise UserError(f"The network's description has format {found!r}, but this version reads format {FORMAT}.")
        source = description.get("source")
        if source is not None and not isinstance(source, Mapping):
            raise UserError(f"The network's description has a source of type {type(source).__name__} instead of dict.")
        encoder = build_described("encoder", description.get("encoder"))
        if generator is None:
            generator = build_described("generator", description.get("generator"))
        refiner = build_described("refiner", description["refiner"]) if "refiner" in description else None
        return cls(encoder, generator, None, description.get("start_from_latent_avg", True), source, refiner)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PSP:
        """Load a trained network in eval mode, without running any code from the file.

        Args:
            path: folder of a run, checkpoint of this library (.ckpt or .safetensors), or released pSp file. A path that
                does not exist is looked up as the name of shipped weights (see `from_pretrained`).
            device: device for the network.

        Raises:
            UserError: `path` contains no such network; the message says what it contains.
        """
        from psp_lightning.inference.frozen import freeze_psp_generator
        from psp_lightning.loading import load_psp

        return freeze_psp_generator(load_psp(path, device))

    @classmethod
    def from_pretrained(cls, name: str, device: str | torch.device = "cpu") -> PSP:
        """Load a trained network of this package in eval mode, without a download.

        Args:
            name: name of the network: `toyfaces/inversion`, `toyfaces/inversion_refined`, `toyfaces/sketch2face`,
                `toyfaces/seg2face` or `toyfaces/superres`. All are for the drawn faces of `psp-data toyfaces`, 64 px.
                `psp_lightning.zoo.locate.shipped()` returns a record of each file: how it was made, its licence and
                its SHA-256.
            device: device for the network.

        Raises:
            UserError: no network has this name (the message lists the names), or its file was changed.
        """
        from psp_lightning.inference.frozen import freeze_psp_generator
        from psp_lightning.loading import load_pretrained

        return freeze_psp_generator(load_pretrained(name, device))

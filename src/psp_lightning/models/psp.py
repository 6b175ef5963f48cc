"""pSp: an encoder in front of a frozen generator.

Source: Richardson et al., pSp (arXiv:2008.00951), section 3: `pSp(x) = G(E(x) + w_average)`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import psp_lightning.models.encoders  # noqa: F401  fills the registry that from_description reads
from psp_lightning.models.layers import HalfPrecision, freeze
from psp_lightning.models.registry import ENCODERS, GENERATORS
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.errors import UserError, suggest

FORMAT = 1


class PSP(nn.Module):
    """Encoder, frozen generator and average latent.

    Args:
        encoder: any registered encoder, see `register_encoder`.
        generator: frozen in place.
        latent_avg: (style_dim,) or (n_styles, style_dim) average latent; None means zeros.
        start_from_latent_avg: add it to what the encoder gives.
        source: what the network takes as source, as plain values (`InputSpec.to_dict()`); only carried along.

    Attributes:
        latent_avg: buffer (n_styles, style_dim).

    Raises:
        UserError: when encoder, generator and average do not fit together.
    """

    latent_avg: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        generator: nn.Module,
        latent_avg: Tensor | None = None,
        start_from_latent_avg: bool = True,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.n_styles: int = generator.n_styles  # type: ignore[assignment]
        self.style_dim: int = generator.style_dim  # type: ignore[assignment]
        for name, wanted in (("style_dim", self.style_dim), ("n_styles", self.n_styles)):
            given = getattr(encoder, name, wanted)
            if given != wanted:
                raise UserError(
                    f"{type(encoder).__name__} has {name}={given}, but the {generator.output_size} px generator "
                    f"needs {name}={wanted}."
                )
        average = torch.zeros(self.style_dim) if latent_avg is None else latent_avg.detach().clone()
        if tuple(average.shape) not in ((self.style_dim,), (1, self.style_dim), (self.n_styles, self.style_dim)):
            raise UserError(
                f"latent_avg of shape {tuple(average.shape)}: expected ({self.style_dim},) or "
                f"({self.n_styles}, {self.style_dim})."
            )
        self.encoder = encoder
        self.generator = freeze(generator)
        self.register_buffer("latent_avg", average.expand(self.n_styles, -1).clone())
        self.start_from_latent_avg = bool(start_from_latent_avg)
        self.source: dict[str, Any] = dict(source or {})

    def encode_delta(self, x: Tensor) -> Tensor:
        """Source (B, C, input_size, input_size) to the encoder's codes (B, n_styles, style_dim), without the average.

        An encoder with `iterations` is called so many times, with the source and the image of the codes so far (first:
        of the average), and its codes are summed up. Gradients go through the codes of all passes, not through images.

        Raises:
            UserError: when the source has another shape than the encoder was built for.

        Source of the passes: Alaluf et al., ReStyle (arXiv:2104.02699), section 3.
        """
        if hasattr(self.encoder, "iterations"):
            delta = self.latent_avg.new_zeros(1, self.n_styles, self.style_dim)
            for _ in range(self.encoder.iterations):  # type: ignore[arg-type]
                with torch.no_grad():
                    image = self.decode(self._add_average(delta))
                delta = delta + self.encoder(x, image)
            return delta
        delta = self.encoder(x)
        if delta.ndim == 2:  # an encoder into W gives one style for all layers
            delta = delta.unsqueeze(1).expand(-1, self.n_styles, -1)
        return delta

    def encode(self, x: Tensor) -> Tensor:
        """Source (B, C, input_size, input_size) to w_plus (B, n_styles, style_dim); errors as of `encode_delta`."""
        return self._add_average(self.encode_delta(x))

    def _add_average(self, delta: Tensor) -> Tensor:
        return delta + self.latent_avg if self.start_from_latent_avg else delta

    def decode(self, w_plus: Tensor, noise: Noise = "const") -> Tensor:
        """w_plus (B, n_styles, style_dim) to images (B, 3, output_size, output_size), about [-1, 1], not clamped.

        `noise` as in `Generator.synthesis`.
        """
        return self.generator.synthesis(w_plus, noise)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Source to image: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    def mix_styles(
        self, w_plus: Tensor, inject: Tensor | None, latent_mask: Iterable[int], alpha: float = 1.0
    ) -> Tensor:
        """Replaces some styles of a code.

        Args:
            w_plus: (B, n_styles, style_dim); not changed.
            inject: (B or 1, style_dim) or (B or 1, n_styles, style_dim). None sets the styles to zero.
            latent_mask: indices of the styles to replace, 0 (coarsest) to n_styles - 1.
            alpha: the styles become `alpha * inject + (1 - alpha) * w_plus`.

        Returns:
            (B, n_styles, style_dim).

        Raises:
            UserError: for an index out of range or a shape that does not fit.

        Source: pSp (arXiv:2008.00951), section 4.5 (multi-modal synthesis by style mixing).
        """
        indices = [int(i) for i in latent_mask]
        wrong = [i for i in indices if not 0 <= i < self.n_styles]
        if wrong:
            raise UserError(f"latent_mask holds {wrong[0]}: this network has the styles 0 to {self.n_styles - 1}.")
        mixed = w_plus.clone()
        if inject is None:
            mixed[:, indices] = 0
            return mixed
        if inject.ndim == 2:
            inject = inject.unsqueeze(1).expand(-1, self.n_styles, -1)
        fits = tuple(inject.shape[1:]) == tuple(w_plus.shape[1:]) and inject.shape[0] in (1, w_plus.shape[0])
        if not fits:
            raise UserError(
                f"inject of shape {tuple(inject.shape)} does not fit codes {tuple(w_plus.shape)}: give "
                f"({w_plus.shape[0]} or 1, {self.style_dim}) or ({w_plus.shape[0]} or 1, {self.n_styles}, "
                f"{self.style_dim})."
            )
        mixed[:, indices] = (alpha * inject + (1 - alpha) * w_plus)[:, indices].to(mixed.dtype)
        return mixed

    def for_inference(self, dtype: torch.dtype = torch.float32, pack: bool = True) -> PSP:
        """A copy that encodes and decodes faster, for inference where it is made: not to be trained, moved or saved.

        BatchNorm is folded into the encoder's convolutions, tensors are channels_last, constants are computed once.

        Args:
            dtype: float32: results agree with this network's to 1e-4 of their largest value. bfloat16: encoder and
                generator (from 16 px on) compute in it; of an image in [-1, 1] the mean difference is below 2/255.
                Both give float32 codes and images.
            pack: see `FusedEncoder`.

        Raises:
            UserError: another dtype.
        """
        from psp_lightning.inference.frozen import freeze_generator, plain_generator
        from psp_lightning.inference.fused import FusedEncoder

        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"for_inference takes torch.float32 or torch.bfloat16, not {dtype}.")
        encoder: nn.Module = self.encoder
        if not isinstance(encoder, nn.Identity | FusedEncoder):  # Identity: of a generator alone
            encoder = FusedEncoder(encoder, dtype, pack)
        generator = copy.deepcopy(plain_generator(self.generator)).to(memory_format=torch.channels_last)
        if dtype != torch.float32 and isinstance(generator, HalfPrecision):
            generator.use_half(16, dtype)
        generator = freeze_generator(generator) if pack else generator
        return PSP(encoder, generator, self.latent_avg, self.start_from_latent_avg, self.source).eval()

    def describe(self) -> dict[str, Any]:
        """Plain values that rebuild this network (without weights) through `from_description`."""
        return {
            "format": FORMAT,
            "encoder": {"class": type(self.encoder).__name__, **self.encoder.config},  # type: ignore[dict-item]
            "generator": {"class": type(self.generator).__name__, **self.generator.config},  # type: ignore[dict-item]
            "start_from_latent_avg": self.start_from_latent_avg,
            "source": dict(self.source),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], generator: nn.Module | None = None) -> PSP:
        """The network that `describe` described, with fresh weights and a zero average.

        Args:
            description: plain values.
            generator: takes the place of the described one, which is then not looked at.

        Classes are looked up in the registries; a name that is not registered is an error, nothing is imported.

        Raises:
            UserError: when the description is of another format, names an unknown class, or has wrong arguments.
        """
        if not isinstance(description, Mapping) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, Mapping) else type(description).__name__
            raise UserError(f"The network's description has format {found!r}, this version reads format {FORMAT}.")
        source = description.get("source")
        if source is not None and not isinstance(source, Mapping):
            raise UserError(f"The network's description has a source of type {type(source).__name__}, expected a dict.")
        encoder = build_described(ENCODERS, "encoder", description.get("encoder"))
        if generator is None:
            generator = build_described(GENERATORS, "generator", description.get("generator"))
        return cls(
            encoder,
            generator,
            start_from_latent_avg=bool(description.get("start_from_latent_avg", True)),
            source=source,
        )

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PSP:
        """A trained network in eval mode: from a run's folder, a checkpoint of ours (.ckpt or .safetensors), a released
        pSp file, or, where there is no such path, the name of shipped weights (see `from_pretrained`).

        Raises:
            UserError: when there is none at `path`; the message says what is there. No code from the file runs.
        """
        from psp_lightning.inference.frozen import freeze_psp_generator  # both build on models, so only here
        from psp_lightning.loading import load_psp

        return freeze_psp_generator(load_psp(path, device))

    @classmethod
    def from_pretrained(cls, name: str, device: str | torch.device = "cpu") -> PSP:
        """A trained network of this package, in eval mode; nothing is downloaded.

        Args:
            name: `toyfaces/inversion`, `toyfaces/sketch2face`, `toyfaces/seg2face` or `toyfaces/superres`: networks for
                the drawn faces of `psp-data toyfaces`, 64 px. `psp_lightning.zoo.locate.shipped()` has the
                records of all files: how each was made, licence, SHA-256.
            device: where the network goes.

        Raises:
            UserError: no such network, with the names that there are; a file that was changed.
        """
        from psp_lightning.inference.frozen import freeze_psp_generator
        from psp_lightning.loading import load_pretrained

        return freeze_psp_generator(load_pretrained(name, device))


def build_described(table: Mapping[str, type[nn.Module]], role: str, node: Any) -> Any:
    """The network of a description: its `class`, looked up in `table`, called with the other values.

    Raises:
        UserError: no such class, or values that do not fit it.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("class"), str):
        raise UserError(f"The network's description lacks its {role}.")
    name = node["class"]
    if name not in table:
        raise UserError(
            f"Unknown {role} {name!r}.{suggest(name, table)} Known: {', '.join(sorted(table))}. An own class must be "
            f"decorated with register_{role} and imported before its checkpoint is loaded."
        )
    _check_numbers(table[name], role, node)
    try:
        return table[name](**{k: v for k, v in node.items() if k != "class"})
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"The network's description does not fit its {role} {name}: {error}") from error


LARGEST = 1 << 20  # of any number in a description of the library's own networks


def _check_numbers(cls: type[nn.Module], role: str, node: Mapping[str, Any]) -> None:
    """Refuse counts that would keep a constructor busy for ever; own classes may use numbers as they like."""
    if not cls.__module__.startswith("psp_lightning."):
        return
    for key, value in node.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not abs(number) <= LARGEST:
                raise UserError(f"The network's description does not fit its {role}: {key}={str(number)[:20]}.")

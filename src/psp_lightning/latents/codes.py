"""Latent codes, and the generator that they belong to.

| space | shape | comes from |
|---|---|---|
| `z` | (N, z_dim) | standard normal draws |
| `w` | (N, style_dim) | the mapping network |
| `w_plus` | (N, n_styles, style_dim) | an encoder, or a projection |

Their files: `latents/files.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import torch
from torch import Tensor, nn

from psp_lightning.checkpoints.weight_files import generator_hash
from psp_lightning.models.psp import PSP
from psp_lightning.utils.arguments import choice
from psp_lightning.utils.errors import UserError, suggest

SPACES = ("z", "w", "w_plus")


@dataclass(frozen=True)
class Latents:
    """Codes with what is known of them.

    Args:
        codes: float32, as the table above.
        names: one a code, unique: relative paths without a suffix, with `/`.
        space: `z`, `w` or `w_plus`.
        generator: its `generator_hash`; None for plain arrays.
        checkpoint: what the file with the generator was called, for messages.
        latent_avg: whether the average latent is included, as in what `PSP.encode` gives.

    Raises:
        UserError: an unknown space, a shape of another space, values that are not finite, names that are not unique or
            would leave the folder of the outputs.
    """

    codes: Tensor
    names: tuple[str, ...]
    space: str = "w_plus"
    generator: str | None = None
    checkpoint: str | None = None
    latent_avg: bool = True

    def __post_init__(self) -> None:
        choice("space", self.space, SPACES)
        wanted = 3 if self.space == "w_plus" else 2
        if self.codes.ndim != wanted or not self.codes.numel():
            shape = "(N, n_styles, style_dim)" if wanted == 3 else "(N, dimensions)"
            raise UserError(f"codes of {self.space} have the shape {shape}, not {tuple(self.codes.shape)}.")
        if not bool(self.codes.isfinite().all()):
            raise UserError("there are values that are not finite among the codes.")
        if len(self.names) != len(self.codes):
            raise UserError(f"there are {len(self.names)} names for {len(self.codes)} codes.")
        if len(set(self.names)) < len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise UserError(f"the name {twice[:60]!r} is there twice.")
        for name in self.names:
            path = PurePosixPath(name)
            odd = not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
            if odd or str(path) != name or len(name) > 1000:
                raise UserError(f"{name[:60]!r} cannot be the name of an output: give a relative path without '..'.")

    def __len__(self) -> int:
        return len(self.names)

    def only(self, name: str) -> Latents:
        """Return the one code of this name.

        Raises:
            UserError: there is none.
        """
        if name not in self.names:
            raise UserError(f"there is no code called {name!r}.{suggest(name, self.names)} There are {len(self)}.")
        index = self.names.index(name)
        return replace(self, codes=self.codes[index : index + 1], names=(name,))

    def of(self, generator: nn.Module, checkpoint: str | None = None, any_generator: bool = False) -> Latents:
        """Return these codes as codes of `generator`.

        Args:
            generator: the one that is to decode them.
            checkpoint: its name, for messages and for what is written.
            any_generator: take codes of another generator, as long as the dimensions fit.

        Raises:
            UserError: codes of another generator, or of other dimensions.
        """
        found = generator_hash(generator)
        if self.generator not in (None, found) and not any_generator:
            raise UserError(
                f"the latents belong to the generator of {self.checkpoint or 'a file without a name'} (hash "
                f"{str(self.generator)[:16]}), but {checkpoint or 'this generator'} has another one (hash "
                f"{found[:16]}): decode them with their own, or give any_generator=true where the two are related."
            )
        length, style_dim = self.codes.shape[-1], generator.style_dim
        wanted = generator.z_dim if self.space == "z" else style_dim
        styles = self.codes.shape[1] if self.space == "w_plus" else generator.n_styles
        if (length, styles) != (wanted, generator.n_styles):
            raise UserError(
                f"codes of {self.space} of shape {tuple(self.codes.shape)} do not fit: {checkpoint or 'the generator'} "
                f"takes z (N, {generator.z_dim}), w (N, {style_dim}), w_plus (N, {generator.n_styles}, {style_dim})."
            )
        return replace(self, generator=found, checkpoint=checkpoint)

    def lacking(self, net: PSP) -> Tensor | None:
        """Return the average latent (n_styles, style_dim) that these codes lack; None where they include it.

        Raises:
            UserError: they lack it, and `net` has none.
        """
        if self.latent_avg or self.space == "z":
            return None
        if not bool(net.latent_avg.any()):
            raise UserError("the latents lack the average latent, and the checkpoint has none to add.")
        return net.latent_avg

    @torch.no_grad()
    def into(self, space: str, net: PSP | None = None) -> Latents:
        """Return the same codes in another space, the average latent included.

        Args:
            space: `w` from z, `w_plus` from z or w; `w` from w_plus where all styles of a code are equal.
            net: the network whose generator they belong to; not needed for w_plus to w.

        Raises:
            UserError: there is no way, or it needs `net`.
        """
        choice("space", space, SPACES)
        added = self.latent_avg or self.space == "z"
        if space == self.space and added:
            return replace(self, latent_avg=True)
        if space == "z":
            raise UserError("there is no way from w or w_plus back to z.")
        if net is None and not (added and self.space == "w_plus"):
            raise UserError(f"{self.space} into {space} needs the network: give ckpt=...")
        if self.space == "w_plus":
            average = None if net is None else self.lacking(net)
            codes = self.codes if average is None else self.codes + average
        else:
            assert net is not None
            average = self.lacking(net)
            parts = [to_w_plus(part, self.space, net.generator, average) for part in self.codes.split(1024)]
            codes = torch.cat(parts)
        if space == "w":
            if not torch.equal(codes, codes[:, :1].expand_as(codes)):
                raise UserError("w_plus into w: the styles of a code differ, one w cannot stand for them.")
            codes = codes[:, 0]
        return replace(self, codes=codes.contiguous(), space=space, latent_avg=True)


def to_w_plus(codes: Tensor, space: str, generator: nn.Module, average: Tensor | None = None) -> Tensor:
    """Turn codes of any space into w_plus (B, n_styles, style_dim).

    Args:
        codes: as the table above.
        average: (n_styles, style_dim), added to codes that lack it; never to z.
    """
    if space == "z":
        codes, average = generator.mapping(codes), None  # type: ignore[operator]
    if codes.ndim == 2:
        codes = codes[:, None].expand(-1, generator.n_styles, -1)  # type: ignore[call-overload]
    return codes if average is None else codes + average

"""Latent codes and the generator that they belong to.

| space | shape | comes from |
|---|---|---|
| `z` | (N, z_dim) | standard normal draws |
| `w` | (N, style_dim) | the mapping network |
| `w_plus` | (N, n_styles, style_dim) | an encoder, or a projection |

See `latents/files.py` for their files.
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
    """Codes with their names, space and generator.

    Args:
        codes: float32, in a shape of the table above.
        names: one unique name per code: relative paths with `/` and without a suffix.
        space: `z`, `w` or `w_plus`.
        generator: the generator's `generator_hash`; None for plain arrays.
        checkpoint: name of the generator's file, used in messages.
        latent_avg: whether the codes include the average latent, as the codes of `PSP.encode` do.
        refined: whether each code has a file of `latents/refinements.py`, which belongs to its image too.

    Raises:
        UserError: the space is unknown, the shape does not fit the space, a value is not finite, or a name is not
            unique or would leave the output folder.
    """

    codes: Tensor
    names: tuple[str, ...]
    space: str = "w_plus"
    generator: str | None = None
    checkpoint: str | None = None
    latent_avg: bool = True
    refined: bool = False

    def __post_init__(self) -> None:
        choice("space", self.space, SPACES)
        wanted = 3 if self.space == "w_plus" else 2
        if self.codes.ndim != wanted or not self.codes.numel():
            shape = "(N, n_styles, style_dim)" if wanted == 3 else "(N, dimensions)"
            raise UserError(f"codes of {self.space} have the shape {shape}, not {tuple(self.codes.shape)}.")
        if not bool(self.codes.isfinite().all()):
            raise UserError("some codes are not finite.")
        if len(self.names) != len(self.codes):
            raise UserError(f"there are {len(self.names)} names for {len(self.codes)} codes.")
        if len(set(self.names)) < len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise UserError(f"the name {twice[:60]!r} occurs twice.")
        for name in self.names:
            path = PurePosixPath(name)
            unsafe = not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
            if unsafe or str(path) != name or len(name) > 1000:
                raise UserError(f"{name[:60]!r} cannot be the name of an output. Use a relative path without '..'.")

    def __len__(self) -> int:
        return len(self.names)

    def only(self, name: str) -> Latents:
        """Return the code with this name.

        Raises:
            UserError: no code has this name.
        """
        if name not in self.names:
            raise UserError(f"no code is called {name!r}.{suggest(name, self.names)} There are {len(self)} codes.")
        index = self.names.index(name)
        return replace(self, codes=self.codes[index : index + 1], names=(name,))

    def of(self, generator: nn.Module, checkpoint: str | None = None, any_generator: bool = False) -> Latents:
        """Return these codes as codes of `generator`.

        Args:
            generator: the generator that will decode them.
            checkpoint: its name, used in messages and files.
            any_generator: accept codes of another generator if their dimensions fit.

        Raises:
            UserError: the codes belong to another generator or have other dimensions.
        """
        found = generator_hash(generator)
        if self.generator not in (None, found) and not any_generator:
            raise UserError(
                f"the latents belong to the generator of {self.checkpoint or 'a file without a name'} (hash "
                f"{str(self.generator)[:16]}), but {checkpoint or 'this generator'} has another one (hash "
                f"{found[:16]}): decode them with their generator, or set any_generator=true if the two are related."
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
        """Return the average latent (n_styles, style_dim) if it must be added to these codes, otherwise None.

        Raises:
            UserError: it must be added, and `net` has none.
        """
        if self.latent_avg or self.space == "z":
            return None
        if not bool(net.latent_avg.any()):
            raise UserError("the latents do not include the average latent, and the checkpoint has none to add.")
        return net.latent_avg

    @torch.no_grad()
    def into(self, space: str, net: PSP | None = None) -> Latents:
        """Return the same codes in another space, including the average latent.

        Args:
            space: `w` from z, `w_plus` from z or w; `w` from w_plus if all styles of a code are equal.
            net: the network of the codes' generator; not needed for w_plus to w.

        Raises:
            UserError: the conversion is impossible or needs `net`.
        """
        choice("space", space, SPACES)
        added = self.latent_avg or self.space == "z"
        if space == self.space and added:
            return replace(self, latent_avg=True)
        if space == "z":
            raise UserError("codes of w or w_plus cannot be converted to z.")
        if net is None and not (added and self.space == "w_plus"):
            raise UserError(f"converting {self.space} to {space} needs the network: set ckpt=...")
        average = None if net is None else self.lacking(net)
        if self.space == "w_plus":
            codes = self.codes if average is None else self.codes + average
        else:
            assert net is not None
            parts = self.codes.split(1024)
            codes = torch.cat([to_w_plus(part, self.space, net.generator, average) for part in parts])
        if space == "w":
            if not torch.equal(codes, codes[:, :1].expand_as(codes)):
                raise UserError("w_plus cannot be converted to w: the styles of a code differ.")
            codes = codes[:, 0]
        return replace(self, codes=codes.contiguous(), space=space, latent_avg=True)


def to_w_plus(codes: Tensor, space: str, generator: nn.Module, average: Tensor | None = None) -> Tensor:
    """Convert codes of any space to w_plus (B, n_styles, style_dim).

    `average` (n_styles, style_dim) is added to codes of w and w_plus, never to z.
    """
    if space == "z":
        codes, average = generator.mapping(codes), None  # type: ignore[operator]
    if codes.ndim == 2:
        codes = codes[:, None].expand(-1, generator.n_styles, -1)  # type: ignore[call-overload]
    return codes if average is None else codes + average

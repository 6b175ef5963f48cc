"""psp-latents: convert latent codes between this package's files and the plain arrays of other tools."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from psp_lightning.cli.settings import command, new_file, parse
from psp_lightning.utils.arguments import choice
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.latents.codes import Latents

USAGE = "psp-latents in=FILE out=FILE [ckpt=...]"
DEFAULTS = {
    "ckpt": "", "space": "", "into": "", "name": "", "names": "", "latent_avg": "included", "any_generator": False,
    "overwrite": False, "plugins": "",
}  # fmt: skip
HELP = f"""{USAGE} [space=...] [into=...] [name=...] [names=FILE]

Converts latent codes. The suffix determines the format:
  .safetensors   this package's format, with names, space and generator; psp-predict latents=true writes it, and
                 psp-predict input= reads it
  .npy .pt       plain numbers, as used by InterFaceGAN (.npy: w (N, 512), w_plus (N, 18, 512)), e4e (.pt: (N, 18, 512))
                 and StyleCLIP (.pt: (1, 18, 512))
  .npz           input only: this package's format of version 0.1.0, or one array

  psp-latents in=out/latents.safetensors out=latents.pt                        for e4e
  psp-latents in=out/latents.safetensors out=face_0.pt name=face_0             one code, for StyleCLIP
  psp-latents in=edited.npy out=edited.safetensors ckpt=toyfaces/inversion     from another tool
  psp-latents in=z.npy space=z into=w out=w.npy ckpt=toyfaces/generator        through the mapping network

in             file to read
out            file to write; overwrite=true replaces an existing one
ckpt           network or generator file that the codes belong to, as in psp-predict. Needed to write .safetensors from
               plain numbers, and for conversions that use the mapping network or the average latent
space          space of plain numbers: z, w or w_plus; default: w_plus for three dimensions, w for two
into           space of the result: z, w or w_plus; default: unchanged
name           write only this code
names          text file with the names of plain codes, one per line; default: 00000, 00001, ...
latent_avg     whether plain numbers contain the average latent: included, or excluded for the raw output of an encoder
any_generator  true: accept a ckpt with another generator than the .safetensors file names, if the shapes fit
plugins        Python modules with custom networks to import first, as a,b
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    values = parse(arguments, DEFAULTS, ("in", "out"), USAGE)
    from psp_lightning.build.instantiate import import_plugins
    from psp_lightning.latents.codes import SPACES
    from psp_lightning.latents.files import OURS, PLAIN, save_latents, save_plain
    from psp_lightning.loading import load_decoder

    out = new_file(values, (OURS, *PLAIN))
    if values["into"]:
        choice("into", values["into"], SPACES)
    choice("latent_avg", values["latent_avg"], ("included", "excluded"))
    latents = _read(values, values["latent_avg"] == "excluded")
    net = None
    if values["ckpt"]:
        import_plugins(values["plugins"])
        net = load_decoder(values["ckpt"])
        if latents.generator is None and not values["space"] and latents.space == "w" and len(latents) == net.n_styles:
            shape = "x".join(map(str, latents.codes.shape))
            raise UserError(
                f"{values['in']} contains {shape} numbers: one code of w_plus (space=w_plus), or "
                f"{len(latents)} codes of w (space=w)? Set space."
            )
        latents = latents.of(net.generator, values["ckpt"], values["any_generator"])
    elif out.suffix == OURS and latents.generator is None:
        raise UserError(f"{values['in']} does not name the generator of its codes. Give ckpt=...")
    if values["name"]:
        latents = latents.only(values["name"])
    plain = out.suffix in PLAIN
    if values["into"] or (plain and not latents.latent_avg):  # other tools expect the average to be included
        latents = latents.into(values["into"] or latents.space, net)
    if latents.refined and plain:
        print(f"{out} has only the codes; what refines them stays in the files next to {values['in']}", file=sys.stderr)
    (save_plain if plain else save_latents)(out, latents)
    print(f"{len(latents)} {latents.space} codes, {tuple(latents.codes.shape)}: {out}")


def _read(values: dict[str, str], excluded: bool) -> Latents:
    """Read the codes in `in`; apply `space`, `names` and `latent_avg` to plain numbers."""
    from psp_lightning.latents.files import is_plain, read_latents, read_plain

    path = Path(values["in"]).expanduser()
    if not is_plain(path):
        if given := [key for key in ("space", "names") if values[key]] + ["latent_avg"] * excluded:
            raise UserError(f"{given[0]}=... is for plain numbers; {path} records it already.")
        return read_latents(path)
    latents = replace(read_plain(path, values["space"] or None), latent_avg=not excluded)
    if not values["names"]:
        return latents
    try:
        names = Path(values["names"]).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"names={values['names']} cannot be read: {error}.") from None
    return replace(latents, names=tuple(names))


def main() -> None:
    """Entry point of `psp-latents`."""
    command(HELP, run)


if __name__ == "__main__":
    main()

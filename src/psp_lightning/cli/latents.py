"""psp-latents: latent codes between our files and the plain arrays of other tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from psp_lightning.cli.settings import choice, command, new_file, parse
from psp_lightning.utils.errors import UserError

if TYPE_CHECKING:
    from psp_lightning.latents.codes import Latents

USAGE = "psp-latents in=FILE out=FILE [ckpt=...]"
DEFAULTS = {
    "ckpt": "", "space": "", "into": "", "name": "", "names": "", "latent_avg": "included", "any_generator": False,
    "overwrite": False, "plugins": "",
}  # fmt: skip
HELP = f"""{USAGE} [space=...] [into=...] [name=...] [names=FILE]

Converts latent codes. Suffixes say what the files are:
  .safetensors .npz   ours, with names, space and generator: what psp-predict latents=true writes and input= takes
  .npy .pt            numbers alone, as InterFaceGAN (.npy: w (N, 512), w_plus (N, 18, 512)), e4e (.pt: (N, 18, 512))
                      and StyleCLIP (.pt: (1, 18, 512)) have them; .npz with one array is read too

  psp-latents in=out/latents.safetensors out=latents.pt                        for e4e
  psp-latents in=out/latents.safetensors out=face_0.pt name=face_0             one code, for StyleCLIP
  psp-latents in=edited.npy out=edited.safetensors ckpt=toyfaces/inversion     from another tool
  psp-latents in=z.npy space=z into=w out=w.npy ckpt=toyfaces/generator        through the mapping network

in             file
out            file; overwrite=true replaces one that is there
ckpt           whose generator the codes belong to, as in psp-predict or a generator alone: needed to write a file of
               ours from plain numbers, and where the mapping network or the average latent is
space          of plain numbers: z, w or w_plus; default: w_plus for three dimensions, w for two
into           space of the result: z, w, w_plus; default: as it is
name           write this code alone
names          text file with the names of plain codes, one a line; default: 00000, 00001, ...
latent_avg     of plain numbers: included, or excluded where they are an encoder's output before it is added
any_generator  true: ckpt may have another generator than a file of ours names, if the shapes fit
plugins        python modules to import first, as a,b: own networks
"""


def run(arguments: list[str]) -> None:
    """The command."""
    values = parse(arguments, DEFAULTS, ("in", "out"), USAGE)
    from psp_lightning.build.instantiate import import_plugins
    from psp_lightning.latents.codes import SPACES, load_decoder
    from psp_lightning.latents.files import DESCRIBED, PLAIN, save_latents, save_plain

    out = new_file(values, (*DESCRIBED, *PLAIN))
    if values["into"]:
        choice(values, "into", SPACES)
    latents = _read(values, excluded=choice(values, "latent_avg", ("included", "excluded")) == "excluded")
    net = None
    if values["ckpt"]:
        import_plugins([name for name in values["plugins"].split(",") if name])
        net = load_decoder(values["ckpt"])
        latents = latents.of(net.generator, values["ckpt"], values["any_generator"])
    elif out.suffix in DESCRIBED and latents.generator is None:
        raise UserError(f"{values['in']} does not name the generator of its codes: give ckpt=...")
    if values["name"]:
        latents = latents.only(values["name"])
    plain = out.suffix in PLAIN
    if values["into"] or (plain and not latents.latent_avg):  # other tools expect the average in
        latents = latents.into(values["into"] or latents.space, net)
    (save_plain if plain else save_latents)(out, latents)
    print(f"{len(latents)} codes of {latents.space}, {tuple(latents.codes.shape)}: {out}")


def _read(values: dict[str, str], excluded: bool) -> Latents:
    """`in`, with `space`, `names` and `latent_avg` where it is plain."""
    from psp_lightning.latents.files import is_plain, read_latents, read_plain

    path = Path(values["in"]).expanduser()
    if not is_plain(path):
        if given := [key for key in ("space", "names") if values[key]] + ["latent_avg"] * excluded:
            raise UserError(f"{given[0]}=... is for plain numbers; {path} says so itself.")
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

"""psp-data: write a dataset to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from psp_lightning.cli._main import guard
from psp_lightning.utils.errors import UserError, suggest

DEFAULTS = {"n": 1000, "size": 256, "seed": 0}
HELP = """psp-data toyfaces out=DIR [n=1000] [size=256] [seed=0]

Draws faces and writes them in the folder layout of CelebAMask-HQ:
  DIR/CelebA-HQ-img/0.jpg ...        images
  DIR/CelebAMask-HQ-mask/0.png ...   label maps, pixel value = class id (0 to 18)
  DIR/sketch/0.png ...               line sketches

out    folder, made if missing; must not hold a dataset already
n      number of faces
size   height and width in pixels
seed   another seed, other faces
"""


def _parse(arguments: list[str]) -> tuple[Path, dict[str, int]]:
    names = ["out", *DEFAULTS]
    if arguments[0] != "toyfaces":
        raise UserError(f"there is no dataset '{arguments[0]}'.{suggest(arguments[0], ['toyfaces'])} Known: toyfaces.")
    values = dict(DEFAULTS)
    out = None
    for argument in arguments[1:]:
        key, sign, value = argument.partition("=")
        if not sign or key not in names:
            raise UserError(f"'{argument}' is no setting.{suggest(key, names)} Settings: {', '.join(names)}, as n=100.")
        if key == "out" and value:
            out = Path(value)
            continue
        try:
            values[key] = int(value)
        except ValueError:
            raise UserError(f"{key}={value} is not a whole number.") from None
    if out is None or not arguments:
        raise UserError("out=DIR is missing: psp-data toyfaces out=DIR")
    return out, values


def main() -> None:
    """Entry point of `psp-data`."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP)
        sys.exit(0 if arguments else 1)

    def run() -> None:
        out, values = _parse(arguments)
        from psp_lightning.data.toyfaces.faces import write_dataset

        write_dataset(out, n=values["n"], size=values["size"], seed=values["seed"])
        print(f"{values['n']} faces of {values['size']} px: {out}")

    guard(run)


if __name__ == "__main__":
    main()

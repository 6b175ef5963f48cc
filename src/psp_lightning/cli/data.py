"""psp-data: write a drawn dataset to a folder."""

from __future__ import annotations

from pathlib import Path

from psp_lightning.cli.settings import command, parse, verb

USAGE = "psp-data toyfaces out=DIR"
HELP = f"""{USAGE} [n=1000] [size=256] [seed=0]

Draws faces and writes them to a folder in the layout of CelebAMask-HQ:
  DIR/CelebA-HQ-img/0.jpg ...        images
  DIR/CelebAMask-HQ-mask/0.png ...   label maps, pixel value = class id (0 to 18)
  DIR/sketch/0.png ...               line sketches

out    folder; it is created if missing and must not contain a dataset
n      number of faces
size   height and width in pixels
seed   seed of the faces; each seed draws different ones
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    verb("psp-data", arguments, ["toyfaces"])
    values = parse(arguments[1:], {"n": 1000, "size": 256, "seed": 0}, ["out"], USAGE)
    from psp_lightning.data.toyfaces import write_dataset

    out = Path(values["out"]).expanduser()
    write_dataset(out, n=values["n"], size=values["size"], seed=values["seed"])
    print(f"{values['n']} faces of {values['size']} px: {out}")


def main() -> None:
    """Entry point of `psp-data`."""
    command(HELP, run)


if __name__ == "__main__":
    main()

"""psp-export: write a network as ONNX, TorchScript or safetensors, with a model card."""

from __future__ import annotations

from psp_lightning.cli.settings import command, new_file, parse
from psp_lightning.utils.arguments import choice

USAGE = "psp-export ckpt=RUN_OR_FILE out=FILE [what=both]"
DEFAULTS = {"format": "", "what": "both", "refine": "auto", "overwrite": False, "plugins": ""}
HELP = f"""{USAGE} [format=...]

Exports a network for other programs and compares the file with PyTorch at batch sizes 1 and 3. Also writes FILE.md,
which documents inputs, outputs, their ranges, origin and licence (if the checkpoint records them) and how to call it.

  psp-export ckpt=toyfaces/inversion out=inversion.onnx
  psp-export ckpt=runs/inversion/NAME out=encoder.pt what=encoder
  psp-export ckpt=toyfaces/generator out=generator.onnx what=generator

ckpt       as in psp-predict: run folder, checkpoint, released pSp .pt, shipped weights; with what=generator also a
           generator file
out        file to write; overwrite=true replaces an existing one
format     onnx (.onnx), torchscript (.pt) or safetensors (.safetensors, for psp-lightning); default: from the suffix
what       encoder     source to w_plus, with the average latent added
           generator   w_plus to image, with constant noise
           both        source to image
refine     auto: with the network's refiner, if it has one; none: without it
plugins    Python modules with custom networks to import first, as a,b

ONNX needs two extra packages: pip install onnx onnxruntime
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    values = parse(arguments, DEFAULTS, ("ckpt", "out"), USAGE)
    from psp_lightning.build.instantiate import import_plugins
    from psp_lightning.inference.export import PARTS, SUFFIXES, check_packages, export
    from psp_lightning.inference.model_card import facts_of
    from psp_lightning.loading import load_decoder

    what = choice("what", values["what"], PARTS)
    wanted = choice("format", values["format"], SUFFIXES) if values["format"] else ""
    refine = choice("refine", values["refine"], ("auto", "none"))
    out = new_file(values, [suffix for name, suffix in SUFFIXES.items() if wanted in ("", name)])
    format = next(name for name, suffix in SUFFIXES.items() if suffix == out.suffix)
    check_packages(format)
    import_plugins(values["plugins"])
    net = load_decoder(values["ckpt"])
    if refine == "none":
        net.refiner = None
    done = export(net, out, format, what, facts_of(values["ckpt"]))
    print(f"wrote {done.path} ({done.path.stat().st_size / 1e6:.1f} MB) and {done.card}")
    print(f"largest difference from PyTorch at batch sizes 1 and 3: {done.difference:.1g}")


def main() -> None:
    """Entry point of `psp-export`."""
    command(HELP, run)


if __name__ == "__main__":
    main()

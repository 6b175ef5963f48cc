"""psp-export: a network as ONNX, TorchScript or safetensors, with a model card."""

from __future__ import annotations

from psp_lightning.cli.settings import choice, command, new_file, parse

USAGE = "psp-export ckpt=RUN_OR_FILE out=FILE [what=both]"
DEFAULTS = {"format": "", "what": "both", "overwrite": False, "plugins": ""}
HELP = f"""{USAGE} [format=...]

Writes a network for other programs, compares the file with PyTorch at batch 1 and 3, and writes FILE.md beside it:
inputs, outputs and their ranges, origin and licence where the checkpoint tells them, the call.

  psp-export ckpt=toyfaces/inversion out=inversion.onnx
  psp-export ckpt=runs/inversion/NAME out=encoder.pt what=encoder
  psp-export ckpt=toyfaces/generator out=generator.onnx what=generator

ckpt       as in psp-predict: run folder, checkpoint, released pSp .pt, shipped weights; for what=generator also a
           generator alone
out        file; overwrite=true replaces one that is there
format     onnx (.onnx), torchscript (.pt) or safetensors (.safetensors, read by psp-lightning); default: by the suffix
what       encoder     source to w_plus, the average latent included
           generator   w_plus to image, with constant noise
           both        source to image
plugins    python modules to import first, as a,b: own networks

ONNX needs two more packages: pip install onnx onnxruntime
"""


def run(arguments: list[str]) -> None:
    """The command."""
    values = parse(arguments, DEFAULTS, ("ckpt", "out"), USAGE)
    from psp_lightning.build.instantiate import import_plugins
    from psp_lightning.inference.export import PARTS, SUFFIXES, check_packages, export
    from psp_lightning.inference.model_card import facts_of
    from psp_lightning.latents.codes import load_decoder

    what = choice(values, "what", PARTS)
    wanted = choice(values, "format", tuple(SUFFIXES)) if values["format"] else ""
    out = new_file(values, [suffix for name, suffix in SUFFIXES.items() if wanted in ("", name)])
    format = next(name for name, suffix in SUFFIXES.items() if suffix == out.suffix)
    check_packages(format)
    import_plugins([name for name in values["plugins"].split(",") if name])
    net = load_decoder(values["ckpt"])
    done = export(net, out, format, what, facts_of(values["ckpt"]))
    size = done.path.stat().st_size / 1e6
    print(f"{done.path} ({size:.1f} MB), at most {done.difference:.1g} from PyTorch at batch 1 and 3; {done.card}")


def main() -> None:
    """Entry point of `psp-export`."""
    command(HELP, run)


if __name__ == "__main__":
    main()

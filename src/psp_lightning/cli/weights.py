"""psp-weights: get, import, check and compare files of weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psp_lightning.cli.settings import choice, command, new_file, parse, verb
from psp_lightning.utils.errors import UserError, clean

if TYPE_CHECKING:
    from psp_lightning.importers.foreign import Imported

IMPORT = "psp-weights import FILE out=FILE.safetensors"
GET = "psp-weights get NAME"
PARITY = "psp-weights parity FILE --against VALUES.npz"
HELP = f"""{IMPORT} [what=all] [label=...] [latent_avg=stored] [in_channels=...]
psp-weights inspect FILE
psp-weights verify FILE_OR_NAME
psp-weights parity FILE --against VALUES.npz|IMAGE.png [seed=0] [psi=1] [tolerance=...]
psp-weights list
psp-weights get NAME [offline=false] [url=...]

import   reads what people have and writes a self-describing file, which generator.path=, ckpt= and init_from= take:
         rosinality's StyleGAN2 .pt, NVIDIA's StyleGAN2 .pkl (stylegan2-ada-pytorch, stylegan3), released pSp, e4e and
         ReStyle .pt, our own runs and files. Size, channels, mapping and average latent are read off the file. Nothing
         in it is run. Prints what was matched, adapted, and not used.
  out          file, .safetensors; overwrite=true replaces one that is there
  what         all; or generator: without an encoder
  label        class of a conditional NVIDIA network, which becomes part of the weights
  latent_avg   stored; or computed: the mean of 100,000 draws instead of the file's
  in_channels  of a pSp or e4e encoder, to start a training with another number: 1 sums the three, more start at zero
  licence      terms of the source, kept in the file
inspect  says what a file is, and what import would make of it
verify   reads a file through and compares its SHA-256 with what was published, or recorded when it was first seen
parity   renders latents and compares with what the original gave; status 1 where they differ. VALUES.npz holds z, w,
         w_plus or source, and image (see docs/weights.md); an image is one of NVIDIA's generate.py with this seed
list     public and shipped weights: origin, licence, size, SHA-256
get      puts public weights into the weights folder (PSP_WEIGHTS, else the user's cache)
"""
SETTINGS = (
    "against", "out", "overwrite", "licence", "label", "what", "latent_avg", "in_channels", "seed", "psi", "tolerance",
    "offline", "url",
)  # fmt: skip


def main() -> None:
    """Entry point of `psp-weights`."""
    command(HELP, run)


def run(arguments: list[str]) -> None:
    """The command."""
    VERBS[verb("psp-weights", arguments, list(VERBS))](arguments[1:])


def _subject(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The file or name, which is the one argument that is no setting, and the settings."""
    values: list[str] = []
    settings: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") and "=" not in argument:
            following = next(rest, None)
            if following is None:
                raise UserError(f"{argument} needs a value: {usage}")
            settings.append(f"{argument[2:]}={following}")
        elif argument.startswith("--"):
            settings.append(argument[2:])
        elif "=" in argument and (values or argument.partition("=")[0] in SETTINGS):
            settings.append(argument)
        else:
            values.append(argument)
    if len(values) != 1:
        raise UserError(f"give one file or name, not {len(values)}: {usage}")
    return values[0], settings


def _number(values: dict[str, str], key: str, kind: type) -> Any:
    """The number `key`, or None where it was not given."""
    if not values[key]:
        return None
    try:
        return kind(values[key])
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f"{key}={values[key]} is not a {what}.") from None


def import_(arguments: list[str]) -> None:
    """`psp-weights import`."""
    file, settings = _subject(arguments, IMPORT)
    defaults = {
        "what": "all", "label": "", "latent_avg": "stored", "in_channels": "", "licence": "", "overwrite": False,
    }  # fmt: skip
    values = parse(settings, defaults, ["out"], IMPORT)
    out = new_file(values, [".safetensors"])
    imported = _read(file, values)
    described(imported)
    table(imported.rows, ("part", "tensors", "result"))
    remarks(imported.notes)
    imported.save(out, {"licence": values["licence"] or "that of the source"})
    from psp_lightning.importers.foreign import import_file

    import_file(out)  # what was written can be read
    where = "ckpt=" if imported.kind == "psp" else "generator.path="
    print(f"wrote {out} ({imported.kind}): {where}{out}")


def _read(file: str, values: dict[str, str]) -> Imported:
    from psp_lightning.checkpoints.strict import WeightsMismatch
    from psp_lightning.importers.foreign import AVERAGES, WHAT, import_file

    choice(values, "what", WHAT)
    choice(values, "latent_avg", AVERAGES)
    label, in_channels = _number(values, "label", int), _number(values, "in_channels", int)
    if in_channels is not None and not 1 <= in_channels <= 1024:
        raise UserError(f"in_channels={in_channels}: it must be 1 to 1024.")
    try:
        return import_file(file, label, values["what"], values["latent_avg"], in_channels)
    except WeightsMismatch as error:
        table(error.report.rows(2), ("part", "tensors", "result"))
        raise


def described(imported: Imported) -> None:
    """Print what a network is."""
    for name, text in imported.summary():
        print(f"{clean(name):<11} {clean(text, 400)}")


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> None:
    """Print columns."""
    lines = [[clean(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def remarks(notes: Iterable[str]) -> None:
    """Print what a user should know."""
    for note in notes:
        print(f"note: {clean(note, 400)}")


def inspect(arguments: list[str]) -> None:
    """`psp-weights inspect`."""
    usage = "psp-weights inspect FILE"
    file, settings = _subject(arguments, usage)
    values = parse(settings, {"label": "", "what": "all", "latent_avg": "stored", "in_channels": ""}, [], usage)
    imported = _read(file, values)
    described(imported)
    for key, value in imported.facts.items():
        print(f"{clean(key):<11} {clean(str(value), 200)}")
    table(imported.rows, ("part", "tensors", "result"))
    remarks(imported.notes)


def verify(arguments: list[str]) -> None:
    """`psp-weights verify`."""
    usage = "psp-weights verify FILE_OR_NAME"
    name, settings = _subject(arguments, usage)
    parse(settings, {}, [], usage)
    from psp_lightning import loading as io
    from psp_lightning.checkpoints import safetensors_io as files
    from psp_lightning.importers import foreign
    from psp_lightning.zoo import download
    from psp_lightning.zoo import locate as pretrained

    entry = pretrained.RECORDS.get(name)
    file = pretrained.find(name) if entry is not None else io.resolve(name)
    if entry is None:
        entry = next((record for record in pretrained.RECORDS.values() if record.filename == file.name), None)
    shipped = next((known for known in pretrained.shipped().values() if known.file == file), None)
    print(f"{file}: {file.stat().st_size} bytes")
    if entry is not None:
        print(download.check(entry, file))
    elif shipped is not None:
        print(f"SHA-256 {pretrained.sha256(file)}: as recorded in the package.")
    else:
        print(f"SHA-256 {pretrained.sha256(file)}: no public file of this name is known.")
    if files.is_safetensors(file) and files.read_described(file)[0].get("kind") == "embedding":
        print("embedding: the identity network of a domain")
    elif entry is None or entry.name.startswith(("psp_", "e4e_", "stylegan2_")):
        described(foreign.import_file(file))
    else:
        io.read(file)
    print("read through: nothing damaged")


def parity(arguments: list[str]) -> None:
    """`psp-weights parity`."""
    file, settings = _subject(arguments, PARITY)
    values = parse(settings, {"seed": "0", "psi": "1", "tolerance": "", "label": ""}, ["against"], PARITY)
    seed, psi = _number(values, "seed", int), _number(values, "psi", float)
    tolerance, label = _number(values, "tolerance", float), _number(values, "label", int)
    if tolerance is not None and not tolerance >= 0 or not 0 <= seed < 1 << 32:
        raise UserError("tolerance must be 0 or more, and seed 0 to 4294967295.")
    from psp_lightning.importers.parity import parity as compare

    results = compare(file, values["against"], seed, psi, tolerance, label)
    for result in results:
        print(result)
    if not all(result.agrees for result in results):
        raise UserError(f"{file} does not give the values of {values['against']}.")


def list_(arguments: list[str]) -> None:
    """`psp-weights list`."""
    parse(arguments, {}, [], "psp-weights list")
    from psp_lightning.zoo import download
    from psp_lightning.zoo import locate as pretrained

    folder = pretrained.weights_dir()
    known = download.recorded()
    print(f"public, for {folder} (psp-weights get NAME):")
    for entry in pretrained.RECORDS.values():
        digest = f"SHA-256 {entry.sha256}..." if entry.sha256 else "SHA-256 not published"
        if entry.name in known:
            digest += f", recorded {known[entry.name]['sha256'][:16]}..."
        state = "there" if (folder / entry.filename).is_file() else "not there"
        print(f"{entry.name}  [{state}]\n    {entry.filename}, {entry.size or 'size not stated'}, {digest}")
        print(f"    for {entry.used_by}\n    from {entry.url}\n    licence: {entry.licence}")
    print("\nshipped in the package:")
    for shipped in pretrained.shipped().values():
        digest = f"SHA-256 {shipped.sha256[:16]}..."
        print(f"{shipped.name}  {shipped.kind}, {shipped.bytes} bytes, {shipped.licence}, {digest}")


def get(arguments: list[str]) -> None:
    """`psp-weights get`."""
    name, settings = _subject(arguments, GET)
    values = parse(settings, {"offline": False, "url": ""}, [], GET)
    from psp_lightning.zoo import download
    from psp_lightning.zoo import locate as pretrained

    entry = pretrained.record(name)
    print(f"licence: {entry.licence}")
    shown = -1

    def progress(done: int, total: int | None) -> None:
        nonlocal shown
        percent = done * 100 // total if total else done >> 20
        if percent != shown and sys.stderr.isatty():
            shown = percent
            print(f"\r{entry.filename}: {percent}{'%' if total else ' MiB'}", end="", file=sys.stderr, flush=True)

    file, compared = download.get(name, values["offline"], values["url"] or None, progress)
    if shown >= 0:
        print(file=sys.stderr)
    print(f"{Path(file)}\n{compared}")


VERBS = {"import": import_, "inspect": inspect, "verify": verify, "parity": parity, "list": list_, "get": get}

if __name__ == "__main__":
    main()

"""psp-weights: get, import, check and compare files of weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from psp_lightning.cli.settings import choice, command, new_file, parse, verb
from psp_lightning.utils.errors import UserError, clean

if TYPE_CHECKING:
    from psp_lightning.importers.report import Imported

IMPORT = "psp-weights import FILE out=FILE.safetensors"
PARITY = "psp-weights parity FILE --against VALUES.npz"
READING = {"what": "all", "label": "", "latent_avg": "stored", "in_channels": ""}
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


def main() -> None:
    """Entry point of `psp-weights`."""
    command(HELP, run)


def run(arguments: list[str]) -> None:
    """The command."""
    VERBS[verb("psp-weights", arguments, list(VERBS))](arguments[1:])


def _parse(
    arguments: list[str], usage: str, defaults: Mapping[str, Any], required: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return the file or name, which is the one argument that is no setting, and the settings.

    `--key value` and `--key=value` are settings as well.
    """
    subjects: list[str] = []
    settings: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            argument = argument[2:]
            if "=" not in argument:
                following = next(rest, None)
                if following is None:
                    raise UserError(f"--{argument} needs a value: {usage}")
                argument = f"{argument}={following}"
            settings.append(argument)
        elif "=" in argument and (subjects or argument.partition("=")[0] in (*defaults, *required)):
            settings.append(argument)
        else:
            subjects.append(argument)
    if len(subjects) != 1:
        raise UserError(f"give one file or name, not {len(subjects)}: {usage}")
    return subjects[0], parse(settings, defaults, required, usage)


def _number(values: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return the number `key`, or None where it was not given."""
    if not values[key]:
        return None
    try:
        return kind(values[key])
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f"{key}={values[key]} is not a {what}.") from None


def _read(file: str, values: Mapping[str, Any]) -> Imported:
    from psp_lightning.checkpoints.strict import WeightsMismatch
    from psp_lightning.importers.imports import AVERAGES, WHAT, import_file

    choice(values, "what", WHAT)
    choice(values, "latent_avg", AVERAGES)
    label, in_channels = _number(values, "label", int), _number(values, "in_channels", int)
    if in_channels is not None and not 1 <= in_channels <= 1024:
        raise UserError(f"in_channels={in_channels}: it must be 1 to 1024.")
    try:
        return import_file(file, label, values["what"], values["latent_avg"], in_channels)
    except WeightsMismatch as error:
        _print_table(error.report.rows(2))
        raise


def _print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    for name, text in pairs:
        print(f"{clean(name):<11} {clean(str(text), 400)}")


def _print_table(rows: Iterable[Sequence[Any]]) -> None:
    lines = [[clean(str(cell)) for cell in row] for row in (("part", "tensors", "result"), *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_import(imported: Imported, facts: Mapping[str, Any]) -> None:
    _print_pairs([*imported.summary(), *facts.items()])
    _print_table(imported.rows)
    for note in imported.notes:
        print(f"note: {clean(note, 400)}")


def import_(arguments: list[str]) -> None:
    """`psp-weights import`."""
    file, values = _parse(arguments, IMPORT, {**READING, "licence": "", "overwrite": False}, ["out"])
    out = new_file(values, [".safetensors"])
    imported = _read(file, values)
    _print_import(imported, {})
    imported.save(out, {"licence": values["licence"] or "that of the source"})
    from psp_lightning.importers.imports import import_file

    import_file(out)  # what was written can be read
    where = "ckpt=" if imported.kind == "psp" else "generator.path="
    print(f"wrote {out} ({imported.kind}): {where}{out}")


def inspect(arguments: list[str]) -> None:
    """`psp-weights inspect`."""
    file, values = _parse(arguments, "psp-weights inspect FILE", READING)
    imported = _read(file, values)
    _print_import(imported, imported.facts)


def verify(arguments: list[str]) -> None:
    """`psp-weights verify`."""
    name, _ = _parse(arguments, "psp-weights verify FILE_OR_NAME", {})
    from psp_lightning.checkpoints.file_kinds import file_kind
    from psp_lightning.checkpoints.read import read_weights, resolve
    from psp_lightning.checkpoints.safetensors_io import read_described, read_description
    from psp_lightning.importers.imports import import_file
    from psp_lightning.zoo import download, locate

    entry = locate.RECORDS.get(name)
    file = resolve(name) if entry is None else locate.find(name)
    entry = entry or next((record for record in locate.RECORDS.values() if record.filename == file.name), None)
    print(f"{file}: {file.stat().st_size} bytes")
    if entry is not None:
        print(download.check(entry, file))
    elif any(known.file == file for known in locate.shipped().values()):
        print(f"SHA-256 {locate.sha256(file)}: as recorded in the package.")
    else:
        print(f"SHA-256 {locate.sha256(file)}: no public file of this name is known.")
    if entry is not None and not entry.name.startswith(("psp_", "e4e_", "stylegan2_")):
        read_weights(file)  # a network of a loss, which is no file that is imported
    elif file_kind(file) == "safetensors" and read_description(file).get("kind") == "embedding":
        read_described(file)
        print("embedding: the identity network of a domain")
    else:
        _print_pairs(import_file(file).summary())
    print("read through: nothing damaged")


def parity(arguments: list[str]) -> None:
    """`psp-weights parity`."""
    file, values = _parse(arguments, PARITY, {"seed": "0", "psi": "1", "tolerance": "", "label": ""}, ["against"])
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
    from psp_lightning.zoo import download, locate

    folder, known = locate.weights_dir(), download.recorded()
    print(f"public, for {folder} (psp-weights get NAME):")
    for entry in locate.RECORDS.values():
        digest = f"SHA-256 {entry.sha256}..." if entry.sha256 else "SHA-256 not published"
        if entry.name in known:
            digest += f", recorded {known[entry.name]['sha256'][:16]}..."
        state = "there" if (folder / entry.filename).is_file() else "not there"
        print(f"{entry.name}  [{state}]\n    {entry.filename}, {entry.size or 'size not stated'}, {digest}")
        print(f"    for {entry.used_by}\n    from {entry.url}\n    licence: {entry.licence}")
    print("\nshipped in the package:")
    for shipped in locate.shipped().values():
        digest = f"SHA-256 {shipped.sha256[:16]}..."
        print(f"{shipped.name}  {shipped.kind}, {shipped.bytes} bytes, {shipped.licence}, {digest}")


def get(arguments: list[str]) -> None:
    """`psp-weights get`."""
    name, values = _parse(arguments, "psp-weights get NAME", {"offline": False, "url": ""})
    from psp_lightning.zoo import download, locate

    entry = locate.record(name)
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
    print(f"{file}\n{compared}")


VERBS = {"import": import_, "inspect": inspect, "verify": verify, "parity": parity, "list": list_, "get": get}

if __name__ == "__main__":
    main()

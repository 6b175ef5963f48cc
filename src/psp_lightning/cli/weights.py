"""psp-weights: download, import, check and compare weight files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from psp_lightning.cli.settings import command, new_file, parse, verb
from psp_lightning.cli.table import print_table
from psp_lightning.utils.arguments import choice, number, whole
from psp_lightning.utils.errors import UserError, clean

if TYPE_CHECKING:
    from psp_lightning.importers.report import Imported

IMPORT = "psp-weights import FILE out=FILE.safetensors"
PARITY = "psp-weights parity FILE --against VALUES.npz"
READING = {"what": "all", "label": int, "latent_avg": "stored", "in_channels": int}
HELP = f"""{IMPORT} [what=all] [label=...] [latent_avg=stored] [in_channels=...]
psp-weights inspect FILE
psp-weights verify FILE_OR_NAME
psp-weights parity FILE --against VALUES.npz|IMAGE.png [seed=0] [psi=1] [tolerance=...]
psp-weights list
psp-weights get NAME [offline=false] [url=...]

import   converts weights to a self-describing file for generator.path=, ckpt= and init_from=. Reads rosinality's
         StyleGAN2 .pt, NVIDIA's StyleGAN2 .pkl (stylegan2-ada-pytorch, stylegan3), released pSp, e4e and ReStyle .pt,
         and this package's runs and files. Size, channels, mapping and average latent are read from the file. No code
         in it is run. Prints which tensors were matched, adapted and not used.
  out          file to write, .safetensors; overwrite=true replaces an existing one
  what         all, or generator to leave out the encoder
  label        class of a conditional NVIDIA network; it becomes part of the weights
  latent_avg   stored, or computed: use the mean of 100,000 draws instead of the file's average
  in_channels  input channels for a pSp or e4e encoder, to start a training with another number: 1 sums the three,
               additional ones start at zero
  licence      terms of the source, stored in the file
inspect  describes a file and what import would make of it
verify   reads a file completely and compares its SHA-256 with the published one, or the one recorded at first use
parity   renders latents and compares the images with the original's; status 1 if they differ. VALUES.npz contains z,
         w, w_plus or source, and image (see docs/weights.md); an image is the output of NVIDIA's generate.py for this
         seed
list     lists public and shipped weights: origin, licence, size, SHA-256
get      downloads public weights to the weights folder (PSP_WEIGHTS; default: the user's cache)
"""


def main() -> None:
    """Entry point of `psp-weights`."""
    command(HELP, run)


def run(arguments: list[str]) -> None:
    """Run the command."""
    VERBS[verb("psp-weights", arguments, list(VERBS))](arguments[1:])


def _parse(
    arguments: list[str], usage: str, defaults: Mapping[str, Any], required: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return the file or name, and the settings, which may also be written `--key value` or `--key=value`."""
    subjects: list[str] = []
    settings: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            argument = argument[2:]
            if "=" not in argument:
                following = next(rest, None)
                if following is None:
                    raise UserError(f"--{argument} needs a value. Usage: {usage}")
                argument = f"{argument}={following}"
            settings.append(argument)
        elif "=" in argument and (subjects or argument.partition("=")[0] in (*defaults, *required)):
            settings.append(argument)
        else:
            subjects.append(argument)
    if len(subjects) != 1:
        raise UserError(f"give one file or name, not {len(subjects)}. Usage: {usage}")
    return subjects[0], parse(settings, defaults, required, usage)


def _read(file: str, values: Mapping[str, Any]) -> Imported:
    from psp_lightning.checkpoints.strict import WeightsMismatch
    from psp_lightning.importers.imports import AVERAGES, WHAT, import_file

    choice("what", values["what"], WHAT)
    choice("latent_avg", values["latent_avg"], AVERAGES)
    in_channels = whole("in_channels", values["in_channels"], 1, 1024, optional=True)
    try:
        return import_file(file, values["label"], values["what"], values["latent_avg"], in_channels)
    except WeightsMismatch as error:
        _print_table(error.report.rows(2))
        raise


def _print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    for name, text in pairs:
        print(f"{clean(name):<11} {clean(str(text), 400)}")


def _print_table(rows: Iterable[Sequence[Any]]) -> None:
    print_table((("part", "tensors", "result"), *rows))


def _print_import(imported: Imported, facts: Mapping[str, Any]) -> None:
    _print_pairs([*imported.summary(), *facts.items()])
    _print_table(imported.rows)
    for note in imported.notes:
        print(f"note: {clean(note, 400)}")


def import_(arguments: list[str]) -> None:
    """Convert a file to a self-describing one."""
    file, values = _parse(arguments, IMPORT, {**READING, "licence": "", "overwrite": False}, ["out"])
    out = new_file(values, [".safetensors"])
    imported = _read(file, values)
    _print_import(imported, {})
    imported.save(out, {"licence": values["licence"] or "same as the source"})
    from psp_lightning.importers.imports import import_file

    import_file(out)  # check that the new file can be read
    where = "ckpt=" if imported.kind == "psp" else "generator.path="
    print(f"wrote {out} ({imported.kind}): {where}{out}")


def inspect(arguments: list[str]) -> None:
    """Describe a file."""
    file, values = _parse(arguments, "psp-weights inspect FILE", READING)
    imported = _read(file, values)
    _print_import(imported, imported.facts)


def verify(arguments: list[str]) -> None:
    """Read a file completely and compare its digest."""
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
        read_weights(file)  # the network of a loss, which cannot be imported
    elif file_kind(file) == "safetensors" and read_description(file).get("kind") == "embedding":
        read_described(file)
        print("embedding: the identity network of a domain")
    else:
        _print_pairs(import_file(file).summary())
    print("read completely: no damage found")


def parity(arguments: list[str]) -> None:
    """Compare the outputs of a file's network with the outputs of the original."""
    defaults = {"seed": 0, "psi": 1.0, "tolerance": float, "label": int}
    file, values = _parse(arguments, PARITY, defaults, ["against"])
    seed = whole("seed", values["seed"], 0, 2**32 - 1)
    tolerance = number("tolerance", values["tolerance"], 0, optional=True)
    from psp_lightning.importers.parity import parity as compare

    results = compare(file, values["against"], seed, values["psi"], tolerance, values["label"])
    for result in results:
        print(result)
    if not all(result.agrees for result in results):
        raise UserError(f"the outputs of {file} differ from the values in {values['against']}.")


def list_(arguments: list[str]) -> None:
    """List public and shipped weights."""
    parse(arguments, {}, [], "psp-weights list")
    from psp_lightning.zoo import download, locate

    folder, known = locate.weights_dir(), download.recorded()
    print(f"public weights, for {folder} (psp-weights get NAME):")
    for entry in locate.RECORDS.values():
        digest = f"SHA-256 {entry.sha256}..." if entry.sha256 else "SHA-256 not published"
        if entry.name in known:
            digest += f", recorded {known[entry.name]['sha256'][:16]}..."
        state = "present" if (folder / entry.filename).is_file() else "missing"
        print(f"{entry.name}  [{state}]\n    {entry.filename}, {entry.size or 'size not stated'}, {digest}")
        print(f"    for {entry.used_by}\n    from {entry.url}\n    licence: {entry.licence}")
    print("\nshipped in the package:")
    for shipped in locate.shipped().values():
        digest = f"SHA-256 {shipped.sha256[:16]}..."
        print(f"{shipped.name}  {shipped.kind}, {shipped.bytes} bytes, {shipped.licence}, {digest}")


def get(arguments: list[str]) -> None:
    """Download public weights."""
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

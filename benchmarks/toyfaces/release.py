"""Put trained networks into the package as float16: `python -m benchmarks.toyfaces.release --generator FILE ...`.

Release the generator and the identity network first, then the encoders that were trained with them, and the inversion
before its refiner is trained: what was made with a replaced file is deleted. docs/toyfaces.md lists all commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from benchmarks.toyfaces.records import write_records
from psp_lightning.checkpoints.weight_files import save_embedding, save_generator, save_psp
from psp_lightning.loading import load_embedding, load_generator, load_psp

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "src" / "psp_lightning" / "weights" / "toyfaces"
NETWORKS = ("inversion", "inversion_refined", "sketch2face", "seg2face", "superres")  # each a run of psp-train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, help="generator.safetensors of psp-train-generator")
    parser.add_argument("--steps", type=int, help="training steps of the generator, for the record")
    parser.add_argument("--identity", type=Path, help="file of benchmarks.toyfaces.train_identity")
    parser.add_argument("--parser", type=Path, help="file of benchmarks.toyfaces.train_parser")
    for name in NETWORKS:
        parser.add_argument(f"--{name}", type=Path, help="run directory of psp-train")
    options = parser.parse_args()
    half, origin = torch.float16, {"licence": "MIT", "data": "toyfaces"}
    if options.generator:
        made_by = f"psp-train-generator domain=toyfaces trainer.max_steps={options.steps}"
        generator, _ = load_generator(options.generator)
        # round as in the file: the average latent and the encoders belong to the rounded weights
        generator.load_state_dict({k: v.to(half).float() for k, v in generator.state_dict().items()})
        save_generator(FOLDER / "generator.safetensors", generator, {**origin, "made_by": made_by}, half)
    if options.identity:
        made_by = "python -m benchmarks.toyfaces.train_identity --out FILE"
        save_embedding(
            FOLDER / "identity.safetensors", load_embedding(options.identity), {**origin, "made_by": made_by}, half
        )
    if options.parser:
        made_by = "python -m benchmarks.toyfaces.train_parser --out FILE"
        save_embedding(
            FOLDER / "parser.safetensors", load_embedding(options.parser), {**origin, "made_by": made_by}, half
        )
    if options.generator or options.identity:  # encoders refer to the generator through its record
        stale = [FOLDER / f"{name}.safetensors" for name in NETWORKS]
        for file in stale:
            file.unlink(missing_ok=True)
        write_records(FOLDER)
    if options.inversion:
        (FOLDER / "inversion_refined.safetensors").unlink(missing_ok=True)  # it contains this encoder
    for name in NETWORKS:
        if run := getattr(options, name):
            net = load_psp(run / "checkpoints" / "last.ckpt")
            given = yaml.safe_load((run / "overrides.yaml").read_text())
            aside = ("run=", "resume=", "paths.", "trainer.enable_progress_bar")  # they do not change the weights
            given = [item for item in given if not item.startswith(aside)]
            made_by = " ".join(["psp-train", *given])
            save_psp(FOLDER / f"{name}.safetensors", net, {**origin, "made_by": made_by}, half, "toyfaces/generator")
    for name, entry in write_records(FOLDER).items():
        print(f"{entry['bytes']:>10}  {entry['sha256'][:16]}  {name}")
    print(FOLDER)


if __name__ == "__main__":
    main()

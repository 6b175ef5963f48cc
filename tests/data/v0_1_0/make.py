"""Make this folder: `python tests/data/v0_1_0/make.py`, only with version 0.1.0 of psp_lightning.

Everything is made in /tmp/v0_1_0 and then copied here, because runs store absolute paths.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from psp_lightning.checkpoints.io import load_generator
from psp_lightning.checkpoints.networks import save_embedding, save_psp

import psp_lightning
from psp_lightning import PSP
from psp_lightning.models.embedding import FaceEmbedding
from psp_lightning.models.registry import ENCODERS

HERE, PLACE = Path(__file__).parent, Path("/tmp/v0_1_0")
sys.path.insert(0, str(HERE.parents[1] / "compat"))
from drawn import drawn_pictures, drawn_source  # noqa: E402
from state_recorder import digest, digests  # noqa: E402

SHARED = ["trainer=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.max_steps=6"]
SHARED += ["callbacks.images=null", "seed=3", "run=old"]
GENERATOR = [
    "domain=toyfaces", "domain.size=16", "data.images.n=20", "data.batch_size=4", "network.style_dim=4",
    "network.z_dim=4", "network.n_mapping=2", "network.channel_base=32", "network.max_channels=4", "model.augment=ada",
    "model.augment_p=0.3", "model.ada_images=2000",
]  # fmt: skip
INVERSION = [
    "generator=file", "generator.path=runs/generator/old", "domain.identity=embedding.safetensors",
    "encoder=gradual_small", "encoder.width=1", "domain.input_size=32", "domain.target_size=16",
    "loss=[l2,perceptual,id,w_norm]", "loss.w_norm.weight=0.01", "data.train.n=7", "data.val.n=3", "data.batch_size=2",
    "data.val_batch_size=2", "trainer.val_every=2", "optimizer=ranger", "optimizer.lr=1e-3", "optimizer.k=2",
    "model.warmup_steps=4", "model.decay_steps=2", "callbacks.last.every_n_steps=3",
]  # fmt: skip
RECORDER = ["+callbacks.recorder._target_=state_recorder.Recorder"]
STOPPED = """
import os, signal, sys
import pytorch_lightning as pl
from psp_lightning.cli.{module} import main
def stop(self, batch, index):
    if self.global_step == {step}:
        {how}
pl.LightningModule.on_train_batch_start = stop
main()
"""
CTRL_C = {"step": 2, "how": "os.kill(os.getpid(), signal.SIGINT)"}  # the step is finished and last.ckpt is written
KILL = {"step": 3, "how": "os._exit(9)"}  # last.ckpt is of step 3, best.ckpt of step 2
NETWORKS = {  # name: encoder, its source
    "e4e_lowres": ("Encoder4Editing", {"kind": "lowres", "factors": [2, 4]}),
    "restyle_masked": ("ReStyleEncoder", {"kind": "masked", "mask": {"kind": "box"}}),
    "w_labels": ("EncoderIntoW", {"kind": "labels", "n_classes": 5, "interpolation": "legacy_bilinear"}),
    "w_plus_sketch": ("EncoderIntoWPlus", {"kind": "sketch"}),
}
CHANNELS = {"rgb": 3, "lowres": 3, "masked": 4, "labels": 5, "sketch": 1}


def command(module: str, *arguments: str, code: int = 0, stop: dict | None = None) -> None:
    start = ["-c", STOPPED.format(module=module, **stop)] if stop else ["-m", f"psp_lightning.cli.{module}"]
    path = os.pathsep.join([str(HERE.parents[1] / "compat"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *start, *arguments], cwd=PLACE, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == code, f"{module} {arguments}: exit status {done.returncode}"


def make_run(module: str, task: str, settings: list[str], stop: dict, code: int) -> dict:
    """Stop a run at step 3, copy its folder, resume it to step 6; return the state it resumed from and its log."""
    command(module, *SHARED, *settings, stop=stop, code=code)
    run, kept = PLACE / "runs" / task / "old", HERE / f"{task}_run"
    shutil.copytree(run, kept, ignore=shutil.ignore_patterns(".hydra"))
    command(module, f"resume=runs/{task}/old", *RECORDER, f"+callbacks.recorder.path={PLACE / task}.json")
    record = json.loads((PLACE / f"{task}.json").read_text())
    last = torch.load(kept / "checkpoints" / "last.ckpt", weights_only=True)
    for path in (kept / "checkpoints").iterdir():
        path.with_suffix(".ckpt.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
    assert record["step"] == last["global_step"] == 3 and record.pop("weights") == digests(last["state_dict"])
    if "random_state" in last:
        assert record["random"]["torch"] == digest(last["random_state"][0]["torch"])
    else:
        del record["random"]
    with (run / "csv" / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    for row in rows:
        row.pop("train/images_per_second", None)
    shutil.rmtree(run)  # it is now at step 6
    shutil.copytree(kept, run)
    for path in (kept / "checkpoints").glob("*.ckpt"):
        path.unlink()
    return {**record, "log": [row for row in rows if row["step"] > 3], "stored": stored(last)}


def stored(checkpoint: dict) -> dict:
    """Return the names in a checkpoint."""
    return {
        "top": sorted(checkpoint),
        "state_dict": list(checkpoint["state_dict"]),
        "callbacks": sorted(checkpoint["callbacks"]),
        "optimizer_state": sorted(checkpoint["optimizer_states"][0]["state"][0]),
        "optimizer_groups": sorted(checkpoint["optimizer_states"][0]["param_groups"][0]),
        "loops": sorted(checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
        if checkpoint["loops"]["fit_loop"]["state_dict"] else [],
    }  # fmt: skip


def make_networks() -> None:
    generator, average = load_generator(HERE / "generator_run" / "generator.safetensors")
    (HERE / "networks").mkdir()
    for seed, (name, (encoder, source)) in enumerate(NETWORKS.items()):
        torch.manual_seed(seed)
        styles = {} if encoder == "EncoderIntoW" else {"n_styles": generator.n_styles}
        passes = {"iterations": 2} if encoder == "ReStyleEncoder" else {}
        made = ENCODERS[encoder](
            style_dim=4, in_channels=CHANNELS[source["kind"]], input_size=32, blocks=[1, 1, 1, 1], width=1,
            **styles, **passes,
        )  # fmt: skip
        with torch.no_grad():  # as trained networks have
            for buffer in made.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)
        net = PSP(made, generator, average, start_from_latent_avg=name != "w_labels", source={**source, "size": 32})
        origin = {"data": "none", "licence": "MIT"}
        save_psp(HERE / "networks" / f"{name}.safetensors", net.eval(), origin, torch.float16)


def describe_networks(values: dict[str, np.ndarray]) -> dict:
    found = {}
    files = [HERE / "export.safetensors", *sorted((HERE / "networks").iterdir())]
    for path in [PLACE / "runs" / "inversion" / "old", *files]:
        net, path = PSP.from_checkpoint(path), path.stem
        with torch.no_grad():
            codes = net.encode(drawn_source(net.encoder.in_channels, 32))
            values[f"{path}: codes"], values[f"{path}: image"] = codes.numpy(), net.decode(codes[:1]).numpy()
        found[path] = {
            "encoder": type(net.encoder).__name__,
            "source": net.source,
            "start_from_latent_avg": net.start_from_latent_avg,
        }
    return found


def compact(tree: dict) -> str:
    """Return JSON with the first two levels indented."""
    parts = [
        f'"{key}": ' + (json.dumps(value) if not isinstance(value, dict) else "{\n  " + ",\n  ".join(
            f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()
        ) + "\n }")
        for key, value in tree.items()
    ]  # fmt: skip
    return "{\n " + ",\n ".join(parts) + "\n}"


def main() -> None:
    assert psp_lightning.__version__ == "0.1.0", psp_lightning.__version__
    for path in HERE.iterdir():
        if path.name not in ("make.py", "README.md"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    torch.manual_seed(0)
    embedding = FaceEmbedding(input_size=16, widths=(2, 2), dim=4)
    save_embedding(PLACE / "embedding.safetensors", embedding.eval(), {"data": "none", "licence": "MIT"})
    shutil.copy(PLACE / "embedding.safetensors", HERE)
    expected = {"version": psp_lightning.__version__, "torch": torch.__version__}
    expected["generator"] = make_run("train_generator", "generator", GENERATOR, CTRL_C, 130)
    expected["inversion"] = make_run("train", "inversion", INVERSION, KILL, 9)

    run = "runs/inversion/old"
    command("export", f"ckpt={run}", "out=export.safetensors")
    shutil.copy(PLACE / "export.safetensors", HERE)
    make_networks()
    values: dict[str, np.ndarray] = {}
    expected["networks"] = describe_networks(values)
    drawn_pictures(PLACE / "pictures", 32)
    for suffix in ("safetensors", "npz"):
        settings = [f"output={suffix}", f"latents={suffix}", "accelerator=cpu", "progress_bar=false"]
        command("predict", f"ckpt={run}", "input=pictures", *settings)
        shutil.copy(PLACE / suffix / f"latents.{suffix}", HERE)
    for path in sorted((PLACE / "npz").glob("*.png")):
        values[f"predicted {path.name}"] = np.asarray(Image.open(path))
    command("latents", f"in={HERE / 'latents.safetensors'}", f"out={PLACE / 'codes.npy'}")
    values["predicted codes"] = np.load(PLACE / "codes.npy")
    (HERE / "expected.json").write_text(compact(expected) + "\n")
    np.savez_compressed(HERE / "expected.npz", **values)


if __name__ == "__main__":
    main()

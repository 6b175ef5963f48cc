"""This library's side of the comparison."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import inputs
from benchmarks.compare.case import Case
from benchmarks.compare.floor import floor
from benchmarks.compare.kernels import measure_kernels
from benchmarks.compare.rows import BFLOAT16, GRAPH, Job
from psp_lightning import PSP
from psp_lightning.checkpoints.weight_files import save_psp
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.lit.prediction import FORMATS
from psp_lightning.models.encoders import GradualStyleEncoder
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.images import save_atomic, to_pil

TERMS = ("l2", "lpips", "id", "w_norm")


def is_half(side: str) -> bool:
    """Return whether a side computes in bfloat16."""
    return side in (BFLOAT16, GRAPH)


def write_weights(job: Job) -> None:
    """Write the random weights that `job.files` names, unless they exist.

    `psp` is a network of the published shapes (if there is a reference, it has written this file already). `alexnet`
    and `ir_se50` are read by LPIPS and the identity loss.
    """
    import torchvision

    torch.manual_seed(1)
    if not Path(job.files["psp"]).exists():
        generator = Generator(job.size)
        net = PSP(GradualStyleEncoder(generator.n_styles), generator, torch.randn(512) / 2, source={"kind": "rgb"})
        save_psp(job.files["psp"], net)
    if not Path(job.files["ir_se50"]).exists():
        torch.save(ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112).state_dict(), job.files["ir_se50"])
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), job.files["alexnet"])


def prepare(job: Job) -> Case:
    """Set up this library's side of a row: prediction as in psp-predict, training as in psp-train."""
    if job.kind == "weights":
        return Case(lambda seed: None, lambda _: write_weights(job), lambda _: {})
    if job.kind == "kernels":
        return Case(lambda seed: None, lambda _: measure_kernels(job), lambda _: {})
    return _training(job) if job.kind == "train" else _inference(job)


def _inference(job: Job) -> Case:
    plain = PSP.from_checkpoint(job.files["psp"], job.device)
    description = plain.describe()
    size: int = plain.encoder.input_size  # type: ignore[assignment]
    net = plain.for_inference(torch.bfloat16 if is_half(job.side) else torch.float32)
    del plain

    def picture(seed: int) -> Tensor:
        return inputs.images(seed, job.batch, size, job.device)

    def code(seed: int) -> Tensor:
        return inputs.codes(seed, job.batch, net.n_styles, net.style_dim, job.device)

    choices: dict[str, Any] = {"generator": (code, net.decode), "encoder": (picture, net.encode_delta)}
    draw, part = choices.get(job.kind, (picture, net))
    run: Callable[[Tensor], Tensor] = torch.inference_mode()(part)
    if job.kind == "predict":
        return Case(lambda seed: Path(job.files["images"]), lambda folder: parts(run, net, folder), lambda _: {})
    if job.side == GRAPH:
        from psp_lightning.inference.fixed_batch import FixedBatch  # psp-predict cuda_graphs=true

        run = torch.inference_mode()(FixedBatch(net, job.batch, compile=False, graph=True))
    lowest = (lambda: floor(description, job)) if job.kind == "image" else None
    return Case(draw, run, lambda x: {"output": run(x).float().cpu()}, floor=lowest)


def parts(run: Callable[[Tensor], Tensor], net: PSP, folder: Path, most: int = 8, batch: int = 8) -> dict[str, float]:
    """Measure the seconds per file of the parts of psp-predict one after the other: reading, network, writing."""
    spec = InputSpec.from_dict(net.source)
    files = sorted(folder.iterdir())[:most]
    device = net.latent_avg.device
    run(torch.zeros(batch, spec.channels, spec.size, spec.size, device=device))  # warm-up
    start = time.perf_counter()
    sources = [load_source(file, spec) for file in files]
    read = time.perf_counter()
    outputs: list[Tensor] = []
    for i in range(0, len(sources), batch):
        outputs += run(torch.stack(sources[i : i + batch]).to(device)).float().clamp(-1, 1).cpu()
    computed = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        for i, image in enumerate(outputs):
            save_atomic(to_pil(image), Path(out) / f"{i}.png", **FORMATS["png"])
        written = time.perf_counter()
    seconds = {"reading": read - start, "network": computed - read, "writing": written - computed}
    return {name: value / len(files) for name, value in seconds.items()}


def settings(job: Job, folder: Path) -> list[str]:
    """Return the settings of psp-train for the training step of the comparison."""
    return [
        "domain=ffhq", f"loss=[{','.join(TERMS)}]", f"generator.path={job.files['psp']}",
        f"init_from={job.files['psp']}", "model.backbone=null", f"loss.lpips.weights={job.files['alexnet']}",
        f"loss.id.weights={job.files['ir_se50']}", f"data.root={folder}", "data.num_workers=0",
        f"paths.output_dir={folder}", *job.overrides,
    ]  # fmt: skip


def module_for(job: Job) -> Any:
    """Build the LightningModule that `psp-train` would train."""
    from hydra import compose, initialize_config_dir

    from psp_lightning._conf import config_root
    from psp_lightning.build.trainer import quiet
    from psp_lightning.build.training import build_data, build_module

    quiet()
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(config_root(), version_base="1.3"):
        cfg = compose("train", settings(job, Path(folder)))
        return build_module(cfg, build_data(cfg)).to(job.device)


def _training(job: Job) -> Case:
    module = module_for(job)
    size = module.net.encoder.input_size
    optimizer = module.configure_optimizers()

    def batch(seed: int) -> dict[str, Any]:
        image = inputs.images(seed, job.batch, size, job.device)
        return {"source": image, "target": image, "path": [""] * job.batch}

    def precision() -> torch.autocast:  # as in Lightning for `bf16-mixed`
        return torch.autocast(job.device, torch.bfloat16, enabled=is_half(job.side))

    def run(batch: dict[str, Any]) -> None:
        def closure() -> Tensor:  # as in Lightning
            with precision():
                loss = module.training_step(batch, 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            return loss

        module.optimizer_step(0, 0, optimizer, closure)

    def check(batch: dict[str, Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # for the generator's noise
        with precision():
            total, values, _ = module.evaluate(batch, module.noise)
        total.backward()
        gradient = module.net.encoder.latlayer1.weight.grad.detach().clone().cpu().contiguous()
        optimizer.zero_grad()
        terms = {name: value.cpu() for name, value in values.items() if name in module.losses.terms}
        return {**terms, "loss": total.detach().cpu(), "gradient": gradient}

    return Case(batch, run, check)

"""Prediction: run a network on a list of inputs and write outputs while the next batch is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor, nn

from psp_lightning.data.inputs import InputDataset, InputFile
from psp_lightning.data.spec import InputSpec, source_to_rgb
from psp_lightning.inference.fixed_batch import FixedBatch
from psp_lightning.inference.invert import Inverter, Optimization
from psp_lightning.latents.codes import Latents, to_w_plus
from psp_lightning.latents.files import save_latents
from psp_lightning.latents.refinements import FOLDER as REFINEMENTS
from psp_lightning.latents.refinements import as_stored, save_refinement
from psp_lightning.lit.manifest import append_record, stamp
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.psp import PSP
from psp_lightning.utils.atomic import DISK
from psp_lightning.utils.errors import UserError, clean
from psp_lightning.utils.images import FORMATS, save_atomic, to_pil, to_uint8
from psp_lightning.utils.names import portable
from psp_lightning.utils.pictures import open_8bit


class LitPredictor(pl.LightningModule):
    """Inverts sources (or reads codes), mixes styles and decodes.

    Args:
        net: the network.
        inverter: maps sources to inversions.
        latent_mask: indices of the styles to replace; None: no mixing.
        inject: (n_outputs, n_styles, style_dim), the styles to inject for each output.
        alpha: weight of the injected style, 1 (only this style) to 0 (none of it).
        size: edge length of the outputs; None: the generator's.
        composite: keep the known pixels (inpainting).
        space: space of the codes in batches that contain `latents` instead of `source`.
        average: (n_styles, style_dim), added to codes that do not include it.
        compile: compile inversion and decoding for batches of `batch_size`.
        cuda_graphs: on CUDA, replay inversion and decoding as CUDA graphs for batches of `batch_size`.
        batch_size: size of all batches except the last.
        keep: return the inversions too.
    """

    inject: Tensor | None
    average: Tensor | None

    def __init__(
        self,
        net: PSP,
        inverter: Inverter,
        latent_mask: Sequence[int] | None = None,
        inject: Tensor | None = None,
        alpha: float = 1.0,
        size: int | None = None,
        composite: bool = False,
        space: str = "w_plus",
        average: Tensor | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        batch_size: int = 1,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # torchrun may start more ranks than inputs
        self.net, self.inverter, self.keep = net, inverter, keep
        invert: Callable[..., Any] = _Invert(net, inverter)
        decode: Callable[..., Tensor] = _Decode(net)
        if compile or cuda_graphs:
            invert = FixedBatch(invert, batch_size, compile, cuda_graphs)
            decode = FixedBatch(decode, batch_size, compile, cuda_graphs)
        self.invert, self.decode = invert, decode
        self.latent_mask = list(latent_mask or ())
        self.alpha, self.size, self.composite, self.space = alpha, size, composite, space
        self.register_buffer("inject", inject, persistent=False)
        self.register_buffer("average", average, persistent=False)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return `images` (B, n_outputs, 3, S, S), uint8, and with `keep` the `inversion` before mixing, on the CPU.

        `finite` lists for each input whether its images have only finite values.
        """
        start = time.perf_counter()
        if not batch["index"]:
            return {"seconds": 0.0}
        weights = tuple(batch["weights"]) if "weights" in batch else None
        if "latents" in batch:
            w_plus = to_w_plus(batch["latents"], self.space, self.net.generator, self.average)
            inversion = Inversion(w_plus, batch.get("features"), weights)
        elif any(self.inverter.optimizers()):
            inversion = self.inverter(self.net, batch["source"], batch["target"])
        else:
            inversion = Inversion(*self.invert(batch["source"]))
        if self.keep:
            inversion = as_stored(inversion)  # the image is then the one that the files give, also in bfloat16
        outputs, finite = [], []
        for inject in [None] if self.inject is None else list(self.inject):
            mixed = inversion
            if inject is not None:
                mixed = self.net.mix_styles(inversion, inject[None], self.latent_mask, self.alpha)
            if mixed.weights is not None:
                image = self.net.decode(mixed).float()
            else:
                image = self.decode(*(part for part in (mixed.w_plus, mixed.features) if part is not None)).float()
            if self.composite:
                image = _composite(image, batch["known"], batch["source"][:, 3:])
            if self.size is not None:
                image = F.adaptive_avg_pool2d(image, self.size)  # as the reference resizes
            finite.append(image.flatten(1).isfinite().all(1))
            outputs.append(to_uint8(image))  # on the device: a quarter of the bytes to copy
        # copying to the host waits for the device, so the time below covers the whole batch
        images = torch.stack(outputs, dim=1).cpu()
        seconds = (time.perf_counter() - start) / len(images)
        kept = inversion.cpu() if self.keep else None
        return {"images": images, "finite": torch.stack(finite).all(0).tolist(), "inversion": kept, "seconds": seconds}


class _Invert(nn.Module):
    """The part of a prediction from sources to codes and features, without optimisation."""

    def __init__(self, net: PSP, inverter: Inverter) -> None:
        super().__init__()
        self.net, self.inverter = net, inverter

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        inversion = self.inverter(self.net, source, source)
        return inversion.w_plus, inversion.features


class _Decode(nn.Module):
    """The part of a prediction from codes and features to images."""

    def __init__(self, net: PSP) -> None:
        super().__init__()
        self.net = net

    def forward(self, w_plus: Tensor, features: Tensor | None = None) -> Tensor:
        return self.net.decode(Inversion(w_plus, features))


def _composite(image: Tensor, known: Tensor, hole: Tensor) -> Tensor:
    size = image.shape[-2:]
    known = F.interpolate(known, size=size, mode="bilinear", align_corners=False, antialias=True)
    hole = F.interpolate(hole, size=size, mode="nearest")
    return image * hole + known * (1 - hole)


@dataclass(frozen=True)
class Outputs:
    """The output files of each input, and their lines in the manifest.

    Attributes:
        folder: output folder.
        files: all inputs; the methods refer to them by index.
        format: suffix of the images.
        n_outputs: number of outputs per input.
        side_by_side: also write source | output.
        latents: also write w_plus, one file per input.
        refined: with `latents`, also write what refines the codes, one file per input.
        named: the inputs are entries of one file, so the manifest includes their names.
        checkpoint: name of the checkpoint.
        made: everything else that determines the outputs: the checkpoint's SHA-256 and the settings.
        companions: by index, the second file that an input is read from: its mask, or what refines its code.
    """

    folder: Path
    files: list[InputFile]
    format: str = "png"
    n_outputs: int = 1
    side_by_side: bool = False
    latents: bool = False
    refined: bool = False
    named: bool = False
    checkpoint: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    companions: dict[int, Path] = field(default_factory=dict)

    def images(self, index: int) -> list[Path]:
        """Return the paths of an input's output images."""
        name = self.files[index].name
        names = [name] if self.n_outputs == 1 else [f"{name}_{k}" for k in range(self.n_outputs)]
        return [self.folder / f"{name}.{self.format}" for name in names]

    def comparison(self, index: int) -> Path:
        """Return the path of an input's image source | output."""
        return self.folder / "side_by_side" / f"{self.files[index].name}.{self.format}"

    def code(self, index: int) -> Path:
        """Return the path of an input's code."""
        return self.folder / "latents" / f"{self.files[index].name}.safetensors"

    def refinement(self, index: int) -> Path:
        """Return the path of what refines an input's code."""
        return self.folder / REFINEMENTS / f"{self.files[index].name}.safetensors"

    def all(self, index: int) -> list[Path]:
        """Return the paths of all files of an input."""
        codes = [self.code(index), *[self.refinement(index)] * self.refined] if self.latents else []
        return self.images(index) + [self.comparison(index)] * self.side_by_side + codes

    def record(
        self, index: int, status: str, seconds: float = 0.0, error: str | None = None, files: list[Path] | None = None
    ) -> dict[str, Any]:
        """Return the manifest's record of an input; `files` are the files that exist, by default all of them."""
        source, files = self.files[index].path, self.all(index) if files is None else files
        companion = self.companions.get(index)
        line: dict[str, Any] = {
            "index": index,
            "source": os.fspath(source),
            **({"name": self.files[index].name} if self.named else {}),
            "output": [os.fspath(path) for path in self.images(index) if path in files],
            "status": status,
            "seconds": round(seconds, 6),
            **({} if error is None else {"error": error}),
            "checkpoint": self.checkpoint,
            "made": self.made,
            "stamp": stamp(source) if companion is None else [stamp(source), stamp(companion)],
            "files": [path.relative_to(self.folder).as_posix() for path in files],
        }
        return line


class PredictionWriter(Callback):
    """Writes outputs in threads and collects a record per input.

    `spec` describes the source in side-by-side images. Files of latents include `generator`, the network's
    `generator_hash`, and `checkpoint`, its name.
    """

    def __init__(
        self, outputs: Outputs, spec: InputSpec | None, generator: str | None = None, checkpoint: str | None = None
    ) -> None:
        self.outputs, self.spec, self.generator, self.checkpoint = outputs, spec, generator, checkpoint
        self._threads = ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1))
        self._waiting: list[Future[dict[str, Any]]] = []
        self.records: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        for index, error, seconds in batch["failed"]:
            self._keep(self.outputs.record(index, "error", seconds, error, files=[]))
        source = batch["source"].cpu() if self.outputs.side_by_side and batch["index"] else None
        for i, index in enumerate(batch["index"]):
            seconds = batch["seconds"][i] + outputs["seconds"]
            shown = None if source is None else source[i : i + 1]
            inversion = None if outputs["inversion"] is None else outputs["inversion"][i]
            if not outputs["finite"][i]:
                path = self.outputs.files[index].path
                reason = f"{path}: the output has values that are not finite. Check the checkpoint, or lower refine.lr."
                self._keep(self.outputs.record(index, "error", seconds, reason, files=[]))
                continue
            job = (index, seconds, outputs["images"][i], inversion, shown)
            self._waiting.append(self._threads.submit(self._write, *job))
        most = 4 if self.outputs.refined else 64  # an inversion of weights has a hundred megabytes
        while len(self._waiting) > most or (self._waiting and self._waiting[0].done()):
            self._keep(self._waiting.pop(0).result())  # bounds memory if writing is the slowest part

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self._waiting:
            self._keep(self._waiting.pop(0).result())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        append_record(self.outputs.folder, record)

    def _write(
        self, index: int, seconds: float, images: Tensor, inversion: Inversion | None, source: Tensor | None
    ) -> dict[str, Any]:
        """Write the files of an input and return its record, which gives the reason if a file cannot be written."""
        start, outputs = time.perf_counter(), self.outputs
        options = FORMATS[outputs.format]
        writes: list[Callable[..., None]] = [partial(save_atomic, to_pil(image), **options) for image in images]
        if source is not None:
            assert self.spec is not None
            shown = F.interpolate(source_to_rgb(source, self.spec), size=images.shape[-2:], mode="nearest")
            writes.append(partial(save_atomic, to_pil(torch.cat([to_uint8(shown[0]), *images], dim=-1)), **options))
        if inversion is not None:
            assert self.generator is not None
            maker = (self.generator, self.checkpoint)
            names = (portable(outputs.files[index].name),)
            codes = inversion.w_plus

            def save_code(path: Path) -> None:
                save_latents(path, Latents(codes, names, "w_plus", *maker, refined=outputs.refined))

            writes.append(save_code)
            if outputs.refined:
                writes.append(partial(save_refinement, inversion=inversion, generator=maker[0], checkpoint=maker[1]))
        written, reason = [], None
        for path, write in zip(outputs.all(index), writes, strict=True):
            try:
                write(path=path)
                written.append(path)
            except OSError as error:
                if error.errno in DISK:
                    raise
                reason = reason or f"{path} cannot be written: {error.strerror or error}"
            except UserError as error:
                reason = reason or f"{path} cannot be written: {error}"
        seconds += time.perf_counter() - start
        return outputs.record(index, "ok" if reason is None else "error", seconds, reason, written)


def make_inject(
    net: PSP, latent_mask: Sequence[int] | None, n_outputs: int, seed: int, reference: Tensor | None
) -> Tensor | None:
    """Return the styles to inject, (n_outputs, n_styles, style_dim), or None without a mask.

    Output k has the same style for every input: the reference's, or one drawn from (seed, k).

    Raises:
        UserError: there are several outputs or a reference but no mask, or a style does not exist.
    """
    n_styles = net.n_styles
    if latent_mask is None:
        if n_outputs > 1 or reference is not None:
            raise UserError(f"mix.n_outputs and mix.reference need mix.latent_mask: styles from 0 to {n_styles - 1}.")
        return None
    net.mix_styles(net.latent_avg[None], None, latent_mask)  # raises if a style does not exist
    if reference is not None:
        return net.encode(reference[None]).expand(n_outputs, -1, -1)
    z_dim: int = net.generator.z_dim  # type: ignore[assignment]
    z = [np.random.default_rng([seed, k]).standard_normal(z_dim) for k in range(n_outputs)]
    w = net.generator.mapping(torch.tensor(np.stack(z), dtype=torch.float32))  # type: ignore[operator]  # (n_outputs, style_dim)
    return w[:, None].expand(-1, n_styles, -1)


def save_sheet(
    path: Path, records: list[dict[str, Any]], inputs: InputDataset | None, limit: int = 64, edge: int = 128
) -> None:
    """Write an overview of the first `limit` inputs and their outputs, each `edge` pixels high and above its name.

    Args:
        inputs: the inputs as the network sees them. None: the inputs are latents, so only their outputs appear.
    """
    shown = [record for record in records if record["output"] and record["status"] != "error"][:limit]
    if not shown:
        return
    gap = edge // 8
    width = edge * ((inputs is not None) + len(shown[0]["output"])) + gap
    columns = max(1, 8 * edge // width)
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (min(columns, len(shown)) * width - gap, rows * (edge + gap)), "white")
    font = ImageFont.load_default(0.7 * gap)
    for i, record in enumerate(shown):
        left, top = i % columns * width, i // columns * (edge + gap)
        name = clean(record.get("name") or Path(record["source"]).stem)
        while font.getlength(name) > width - gap:
            name = name[:-1]
        ImageDraw.Draw(sheet).text((left, top + edge), name, fill="black", font=font)
        pictures = [open_8bit(name, "RGB") for name in record["output"]]
        if inputs is not None:
            pictures.insert(0, inputs.picture(record["index"]))
        for k, picture in enumerate(pictures):
            sheet.paste(picture.resize((edge, edge)), (left + k * edge, top))
    save_atomic(sheet, path)


class PredictionBar(TQDMProgressBar):
    """The progress bar of a prediction or an evaluation, with the steps of an optimisation."""

    def __init__(self, label: str = "predict") -> None:
        super().__init__()
        self.label = label
        self._shown = 0.0  # when the steps were shown last

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        for module in pl_module.modules():
            if isinstance(module, Optimization):
                module.method.on_step = self._show

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_start(*args, **kwargs)
        self.predict_progress_bar.set_description(self.label)

    def _show(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self.predict_progress_bar.set_postfix_str(f"step {done} of {total}")

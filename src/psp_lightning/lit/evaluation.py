"""Evaluation: predict and measure in one pass, with the same numbers for any number of ranks.

Each image is measured separately and its values are kept by its index, so they do not depend on its batch or rank.
Batches consist of the same images for any number of ranks, and each rank computes whole batches.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from psp_lightning.data.spec import InputSpec, source_to_rgb
from psp_lightning.inference.invert import Inverter
from psp_lightning.lit.distributed import gather
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8, to_uint8

Batch = dict[str, Any]
FAILURES = (UserError, ValueError, RuntimeError)  # failures of one metric, which do not stop the others


def collate_images(items: list[dict[str, Any]]) -> Batch:
    """Collate items into lists, because images may differ in size; `source` becomes a tensor."""
    batch: Batch = {key: [item[key] for item in items] for key in items[0]}
    batch["index"] = [int(index) for index in batch["index"]]
    if "source" in batch:
        batch["source"] = torch.stack(batch["source"])
    return batch


def share(n: int, batch_size: int, rank: int, world_size: int) -> list[int]:
    """Return the indices of a rank's images: every `world_size`-th batch of `batch_size` consecutive images.

    A batch contains the same images for any number of ranks. Only the last batch may be smaller.
    """
    starts = range(0, n, batch_size)[rank::world_size]
    return [index for start in starts for index in range(start, min(start + batch_size, n))]


class Given(nn.Module):
    """Return images that were made before."""

    def forward(self, batch: Batch) -> list[Tensor]:
        """Return one (1, 3, H, W) tensor for each item."""
        return [output[None] for output in batch["output"]]


class Identity(nn.Module):
    """Return the sources as pictures, in the size of the targets: the baseline of doing nothing."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, batch: Batch) -> list[Tensor]:
        """Return one (1, 3, S, S) tensor for each item."""
        sources = source_to_rgb(batch["source"], self.spec).to(batch["source"].device)
        size = batch["target"][0].shape[-2:]
        return list(F.interpolate(sources, size=size, mode="nearest").split(1))


class Network(nn.Module):
    """Invert, optionally mix, decode, and pool to the size of the targets, as a validation does.

    Args:
        net: the network.
        inverter: embeds and refines; its steps may see the targets. None: `Inverter()`.
        latent_mask, inject, alpha: see `LitPredictor`.
    """

    inject: Tensor | None

    def __init__(
        self,
        net: PSP,
        inverter: Inverter | None = None,
        latent_mask: list[int] | None = None,
        inject: Tensor | None = None,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        self.net, self.inverter = net, inverter or Inverter()
        self.latent_mask, self.alpha = latent_mask or [], alpha
        self.register_buffer("inject", inject, persistent=False)

    def forward(self, batch: Batch) -> list[Tensor]:
        """Return one (n_outputs, 3, S, S) tensor for each item."""
        target = torch.stack(batch["target"])
        size = (target.shape[-2], target.shape[-1])
        inversion = self.inverter(self.net, batch["source"], target)
        outputs = []
        for inject in [None] if self.inject is None else list(self.inject):
            mixed = inversion
            if inject is not None:
                mixed = self.net.mix_styles(inversion, inject[None], self.latent_mask, self.alpha)
            outputs.append(F.adaptive_avg_pool2d(self.net.decode(mixed).float(), size))
        return list(torch.stack(outputs, dim=1))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, because the order of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Results(NamedTuple):
    """The values of an evaluation.

    Attributes:
        per_image: for each metric with values per image, these in the order of the images; NaN for an image without.
        single: for each other metric, its value.
        errors: for each metric that could not be measured, the reason.
        missing: for each metric with values per image, the reasons why images have none, by their index.
    """

    per_image: dict[str, list[float]]
    single: dict[str, float]
    errors: dict[str, str]
    missing: dict[str, dict[int, str]]


class LitEvaluator(pl.LightningModule):
    """Predicts and measures, and keeps the values of each image.

    Args:
        predict: returns the outputs of a batch, one (n_outputs, 3, H, W) tensor for each item.
        metrics: torchmetrics metrics by name. The values of one with `per_image`, such as an `ImageMean`, are kept for
            each image; any other metric is updated with (output, target), both (n_outputs, 3, H, W), and computed at
            the end.
        networks: the modules that the metrics use, which must be on the same device.
        rounded: compare images as 8 bits, otherwise as floats clamped to [-1, 1].

    Attributes:
        values: for each metric, the values of this rank's images by their index.
        missing: for each metric, the reasons why images of this rank have no value (NaN), by their index.
        errors: for each metric that could not be measured, the first index at which it failed, and the reason.
    """

    def __init__(
        self, predict: nn.Module, metrics: dict[str, Metric], networks: nn.Module, rounded: bool = True
    ) -> None:
        super().__init__()
        self.predict, self.networks, self.rounded = predict, networks, rounded
        self.metrics: Any = nn.ModuleDict(metrics)
        self.values: dict[str, dict[int, float]] = {name: {} for name in metrics}
        self.missing: dict[str, dict[int, str]] = {name: {} for name in metrics}
        self.errors: dict[str, tuple[int, str]] = {}

    def seen(self, image: Tensor) -> Tensor:
        """Return images as they are compared: rounded to 8 bits or only clamped, float32 in [-1, 1]."""
        return from_uint8(to_uint8(image)) if self.rounded else image.float().clamp(-1, 1)

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Return the outputs of a batch as they are compared, one (n_outputs, 3, H, W) tensor for each item."""
        return [self.seen(output) for output in self.predict(batch)]

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        """Predict and measure a batch; return the number of its images.

        Raises:
            UserError: an output is not finite; a mean without it would be too good.
        """
        outputs = self.predict(batch)
        with one_thread():
            for i, output in enumerate(outputs):
                item = {key: value[i] for key, value in batch.items()}
                if not bool(output.isfinite().all()):
                    raise UserError(
                        f"The output for {item.get('path', item['index'])} has values that are not finite. Check the "
                        "checkpoint, or lower refine.lr."
                    )
                self._measure(item, self.seen(output), self.seen(item["target"])[None])
        return len(outputs)

    def _measure(self, item: dict[str, Any], outputs: Tensor, target: Tensor) -> None:
        index = item["index"]
        given = {**item, "outputs": outputs}
        for name, metric in self.metrics.items():
            if name in self.errors:
                continue
            try:
                if hasattr(metric, "per_image"):
                    needed = needs(metric, given)
                    values = [float(metric.per_image(output[None], target, **needed)) for output in outputs]
                    self.values[name][index] = sum(values) / len(values)
                    if math.isnan(self.values[name][index]):
                        output = outputs[[math.isnan(value) for value in values].index(True)]
                        self.missing[name][index] = reason(metric, output[None], target, needed)
                else:
                    metric.update(outputs, target.expand_as(outputs))
            except FAILURES as error:
                self.errors[name] = (index, str(error))

    def results(self, n: int) -> Results:
        """Return the values of all ranks; every rank must call this."""
        found: dict[str, tuple[int, str]] = {}
        for share in gather(self.errors):
            for name, error in share.items():
                found[name] = min(error, found.get(name, error))
        shares, all_missing = gather(self.values), gather(self.missing)
        per_image: dict[str, list[float]] = {}
        missing: dict[str, dict[int, str]] = {}
        single: dict[str, float] = {}
        for name, metric in self.metrics.items():
            if name in found:
                continue
            if hasattr(metric, "per_image"):
                merged = {index: value for share in shares for index, value in share[name].items()}
                per_image[name] = [merged[index] for index in range(n)]
                missing[name] = dict(sorted(item for share in all_missing for item in share[name].items()))
            else:
                try:
                    single[name] = float(metric.compute())
                    if not math.isfinite(single[name]):
                        raise ValueError(f"the value is {single.pop(name)}, not a finite number.")
                except FAILURES as error:
                    found[name] = (n, str(error))
        return Results(per_image, single, {name: reason for name, (_, reason) in found.items()}, missing)

    @torch.no_grad()
    def one(self, item: dict[str, Any]) -> tuple[Tensor, float]:
        """Predict one image by itself.

        Returns:
            Its outputs as they are compared, (n_outputs, 3, H, W), and the seconds that they took. Reading is not
            included. On a GPU, the clock waits until the outputs are complete.
        """
        batch = self.transfer_batch_to_device(collate_images([item]), self.device, 0)
        self._synchronise()
        start = time.perf_counter()
        (outputs,) = self.outputs(batch)
        self._synchronise()
        return outputs, time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reason(metric: Any, output: Tensor, target: Tensor, needed: dict[str, Any]) -> str:
    """Return why a metric has no value for an image."""
    return str(metric.reason(output, target, **needed)) if hasattr(metric, "reason") else "no value"


def needs(metric: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments that a metric asks for, as batches of one.

    Raises:
        UserError: the data lack one of these arguments.
    """
    keys = getattr(metric, "needs", ())
    if missing := [key for key in keys if given.get(key) is None]:
        raise UserError(f"it needs {', '.join(missing)} of each image, which this task or these data do not have.")
    return {key: torch.as_tensor(given[key])[None] for key in keys}

"""LitPSP: train and validate a PSP network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.lit import rng
from psp_lightning.lit.distributed import gather
from psp_lightning.lit.edits import Edit, draw_edits
from psp_lightning.lit.generated import Drawing, noise_sides, with_drawn
from psp_lightning.lit.passes import detached_passes
from psp_lightning.losses.base import LossInputs
from psp_lightning.losses.composite import CompositeLoss
from psp_lightning.models.inversion import Inversion
from psp_lightning.models.psp import PSP
from psp_lightning.models.registry import check_registered
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.arguments import ArgumentError, choice, number, whole
from psp_lightning.utils.errors import UserError, plural

Batch = dict[str, Any]
BATCH_NORM_POLICIES = ("sync", "machine", "frozen", "local")


class LitPSP(pl.LightningModule):
    """Trains the encoder and the refiner of `net`, except those that are frozen.

    The generator and the networks inside the losses are always frozen.

    Logs `train/loss`, `train/loss_<term>` and `train/lr` every `log_every` optimizer steps, and `val/loss`,
    `val/loss_<term>` and `val/<metric>` after each validation. A shorter run logs its last step. The logged step is the
    number of finished optimizer steps.

    Args:
        net: encoder, frozen generator and average latent.
        losses: the objective.
        optimizer: builds the optimizer from the trainable parameters.
        metrics: torchmetrics metrics by name; each validation updates them with (output, target), both (B, 3, S, S).
        noise: the generator's noise in training, `random` or `const`; validation always uses `const`.
        batch_norm: `sync`, `machine` and `local` train the BatchNorm layers (the Trainer implements the difference);
            `frozen` keeps their running statistics.
        warmup_steps: number of first optimizer steps over which the learning rate rises linearly.
        decay_steps: number of last optimizer steps over which it falls to zero along half a cosine.
        total_steps: length of the run in optimizer steps; required if `decay_steps` is not 0.
        log_every: optimizer steps between two training rows of the log.
        source_is_target: the source and the target are the same image; a loss then processes it only once.
        edit_share: share of each training batch, at least 0 and below 1, in which a generated image and an edit of its
            codes replace source and target, so that the refiner keeps edits; at least one image, but never all images.
            Only for inversion.
        drawing: how the generated samples of a data module with `generated_share` are drawn.
        loss_per_pass: for an encoder of several passes: compute the losses and their gradients after each pass, as
            ReStyle does. The gradients of a step are summed over the passes, and the log shows the last pass. If
            False, one loss compares the image of the last pass.

    Raises:
        UserError: `batch_norm` or `noise` is unknown, a number of steps is invalid, a metric is no `Metric`, or
            `loss_per_pass` or `edit_share` does not fit the network.
    """

    def __init__(
        self,
        net: PSP,
        losses: CompositeLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        metrics: dict[str, Metric] | None = None,
        noise: str = "random",
        batch_norm: str = "sync",
        warmup_steps: int = 0,
        decay_steps: int = 0,
        total_steps: int = 0,
        log_every: int = 10,
        source_is_target: bool = False,
        edit_share: float = 0.0,
        drawing: Drawing | None = None,
        loss_per_pass: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.drawing = drawing or Drawing()
        self.edit_share = number("edit_share", edit_share, 0)
        if self.edit_share and (net.refiner is None or not source_is_target or self.edit_share >= 1):
            raise UserError(
                f"edit_share={edit_share}: it must be below 1, and it needs a refiner and sources that are also the "
                "targets (task=inversion with equal sizes). Set edit_share=0 without them."
            )
        self.loss_per_pass = loss_per_pass
        if not isinstance(loss_per_pass, bool):
            raise ArgumentError("loss_per_pass", loss_per_pass, "must be true or false.")
        if loss_per_pass and not net.passes:
            rule = f"needs an encoder of several passes, such as encoder=restyle; {type(net.encoder).__name__} has one."
            raise ArgumentError("loss_per_pass", loss_per_pass, rule)
        if loss_per_pass and net.refiner is not None:
            rule = "cannot train a refiner. Train it afterwards, in a new run (init_from=RUN)."
            raise ArgumentError("loss_per_pass", loss_per_pass, rule)
        self.losses = losses
        for name, metric in (metrics or {}).items():
            if not isinstance(metric, Metric):
                raise UserError(f"The metric '{name}' must be an instance of torchmetrics.Metric, not {metric!r}.")
        self.val_metrics = dict(metrics or {})  # in a plain dict, which keeps them out of the checkpoint
        self.make_optimizer = optimizer
        self.noise: Noise = choice("noise", noise, ("random", "const"))
        self.log_every = log_every
        self.batch_norm = choice("batch_norm", batch_norm, BATCH_NORM_POLICIES)
        self.warmup_steps = whole("warmup_steps", warmup_steps, 0)
        self.decay_steps = whole("decay_steps", decay_steps, 0)
        self.total_steps = total_steps
        self.source_is_target = source_is_target
        self._val_sums: dict[str, Tensor] = {}
        self._val_count = 0
        self._row: dict[str, Tensor] = {}
        self._random_state: list[dict[str, Any]] | None = None
        self.train()  # Lightning does not change the modes of modules

    def on_fit_start(self) -> None:
        """Compare the network with the data module, and record its source description if the network has none.

        Raises:
            UserError: the targets are larger than the generator's images, or checkpoints could not be loaded.
        """
        check_registered("encoder", self.net.encoder)
        if self.net.refiner is not None:
            check_registered("refiner", self.net.refiner)
        data = getattr(self.trainer, "datamodule", None)
        drawn, wanted = self.net.generator.output_size, getattr(data, "target_size", 0)
        if wanted > drawn:
            raise UserError(
                f"the targets have {wanted} px, but the generator's images have only {drawn} px: set "
                f"domain.target_size={drawn} and domain.input_size to at most that (from Python: target_size and "
                "input_size of the data module)."
            )
        if not self.net.source and (spec := getattr(data, "spec", None)) is not None:
            self.net.source = spec.to_dict()
        elif not self.net.source:
            rank_zero_warn(
                "the checkpoints will not say what the encoder takes as source, and psp-predict will reject them: "
                "give PSP(..., source=InputSpec('rgb', size=256).to_dict()) with the kind and size of your data."
            )

    # --- steps

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the generated samples of a batch, on this device and in the run's precision."""
        if "seeds" not in batch:
            return batch
        with self.trainer.precision_plugin.forward_context():
            return with_drawn(batch, self.drawing, self.net.generator, self.net.latent_avg)

    def forward(self, x: Tensor) -> Tensor:
        """Map a source (B, C, S, S) to an output (B, 3, output_size, output_size), not clamped."""
        return self.net(x)

    def evaluate(self, batch: Batch, noise: Noise, edits: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the objective, the detached values to log, and the output (B, 3, S, S) pooled to the target's size.

        Pairs of generated and edited images replace the last `edits` images, or the first ones if the last ones are
        generated samples, whose codes a loss may need. Both images of a pair and the output have the same noise.
        """
        y = batch["target"]
        source = y if self.source_is_target else batch["source"]
        generated = batch.get("generated")
        edit: Edit | None = None
        at_start = generated is not None
        edited_part = slice(edits) if at_start else slice(-edits, None)

        def put(values: Tensor, new: Tensor) -> Tensor:
            return torch.cat([new, values[edits:]] if at_start else [values[:-edits], new])

        if edits:
            if noise == "random":
                sides = noise_sides(self.net.generator, "model.noise")
                noise = [torch.randn(len(y), 1, side, side, device=y.device) for side in sides]
            own = noise if isinstance(noise, str) else [maps[edited_part] for maps in noise]
            drawn, edited, edit = draw_edits(self.net.generator, self.net.latent_avg, edits, own)
            size = (y.shape[-2], y.shape[-1])
            source, y = put(source, F.adaptive_avg_pool2d(drawn, size)), put(y, F.adaptive_avg_pool2d(edited, size))
            if generated is not None:  # `codes` has other codes than these images
                generated = put(generated, generated.new_zeros(edits))

        def compare(delta: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
            w_plus = delta + self.net.latent_avg if self.net.start_from_latent_avg else delta
            features = self.net.refine(source, w_plus)
            if edit is not None:
                w_plus = put(w_plus, edit(w_plus[edited_part]))
            image = self.net.decode(Inversion(w_plus, features), noise=noise)  # (B, 3, output_size, output_size)
            y_hat = F.adaptive_avg_pool2d(image, y.shape[-2:])  # (B, 3, S, S), pSp's face_pool
            inputs = LossInputs(
                y_hat=y_hat,
                y=y,
                x=source,
                delta_w_plus=delta,
                w_plus=w_plus,
                latent_avg=self.net.latent_avg,
                codes=batch.get("codes"),
                generated=generated,
            )
            return *self.objective(inputs), y_hat, image

        def learn(delta: Tensor) -> Tensor:
            total, values, _, image = compare(delta)
            self._refuse_non_finite(total, values, batch)
            self.trainer.strategy.backward(total / self.trainer.accumulate_grad_batches, None)
            return image

        if self.loss_per_pass and self.training:
            delta = detached_passes(self.net, source, learn)
        else:
            delta = self.net.encode_delta(source)  # (B, n_styles, style_dim)
        total, values, y_hat, _ = compare(delta)
        return total, values, y_hat

    def objective(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective and the detached values to log; derived classes may add terms."""
        return self.losses(inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        edits = self._count_edits(batch, batch_idx)
        total, values, y_hat = self.evaluate(batch, self.noise, edits)
        if left_out := [name for name in self.losses.terms if name not in values]:
            raise UserError(
                f"the loss '{left_out[0]}' compares codes, which only generated samples have, and this training has "
                "none: set data=generated or data.generated_share (from Python: generated_share of the data module)."
            )
        self._refuse_non_finite(total, values, batch)
        named = self._log_names(total, values)
        self.log_dict({f"train/{k}": v for k, v in named.items()}, prog_bar=True, logger=False)
        self._row = named
        return {"loss": total, "y_hat": y_hat.detach()}

    def _count_edits(self, batch: Batch, batch_idx: int) -> int:
        """Return how many images of a batch edits replace, and raise a UserError if no image would be left."""
        n = len(batch["target"])
        if not self.edit_share:
            return 0
        edits = min(max(1, round(self.edit_share * n)), n - 1)
        if batch_idx == 0:  # later batches are not larger, and the last one of an epoch may be a single image
            images = n - int(batch["generated"].sum()) if "generated" in batch else n
            if not edits or 0 < images <= edits:  # without any image, generated samples make room
                raise UserError(
                    f"edit_share={self.edit_share}: edits would replace all images of a batch, which has "
                    f"{plural(n, 'sample')} and {plural(images, 'image')}. Set a larger batch_size, or a lower "
                    "edit_share or generated_share."
                )
        return edits

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the coming step, so that its row is written before any checkpoint of the step."""
        step = self.global_step + 1
        if step % self.log_every == 0 or step == self.trainer.max_steps < self.log_every:
            row = {f"train/{name}": float(value) for name, value in self._row.items()}
            self._write({**row, "train/lr": optimizer.param_groups[0]["lr"]}, step)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        total, values, y_hat = self.evaluate(batch, "const")
        n = y_hat.shape[0]
        for name, value in self._log_names(total, values).items():
            # weighted by batch size, since the last batch may be smaller
            self._val_sums[name] = self._val_sums.get(name, torch.zeros((), device=self.device)) + value.detach() * n
        self._val_count += n
        for metric in self.val_metrics.values():
            metric.to(self.device)
            further = {key: batch[key] for key in getattr(metric, "needs", ())}  # such as the source
            metric.update(y_hat, batch["target"], **further)
        return {"y_hat": y_hat}

    def on_validation_epoch_end(self) -> None:
        sums = {name: float(value) for name, value in self._val_sums.items()}
        shares = gather((sums, self._val_count))  # from every rank; a rank may have had no image
        count = sum(n for _, n in shares)
        names = {name: None for share, _ in shares for name in share}
        results = {f"val/{name}": sum(share.get(name, 0.0) for share, _ in shares) / count for name in names}
        for name, metric in self.val_metrics.items():
            results[f"val/{name}"] = _one_number(name, metric)
            metric.reset()
        self._val_sums, self._val_count = {}, 0
        # float64 makes these averages equal for any number of devices; mps does not support it
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        self.log_dict({k: torch.tensor(v, dtype=kind, device=self.device) for k, v in results.items()}, logger=False)
        self._write(results, self.global_step)

    def _log_names(self, total: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        terms = self.losses.terms
        return {"loss": total.detach(), **{f"loss_{k}" if k in terms else k: v for k, v in values.items()}}

    def _write(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
            logger.save()  # write to disk at once, so that the run can be watched

    def _refuse_non_finite(self, total: Tensor, values: dict[str, Tensor], batch: Batch) -> None:
        """Raise a UserError if the loss is not finite."""
        if torch.isfinite(total):  # one comparison per step; the terms are searched only on failure
            return
        name = next((k for k, v in values.items() if not torch.isfinite(v)), "sum of the terms")
        raise UserError(
            f"the loss term '{name}' became {float(values.get(name, total))} at step {self.global_step + 1}. "
            f"Files of the batch: {', '.join(map(str, batch['path']))}. Check these files, lower optimizer.lr or set "
            "trainer.gradient_clip_val. Earlier checkpoints are valid: resume=RUN continues from the last one."
        )

    # --- optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.net.parameters() if p.requires_grad])
        if self.warmup_steps == self.decay_steps == 0:
            return optimizer
        # checkpoints do not save a partial, so a run resumed with more steps decays at its new end
        factor = functools.partial(
            rate_factor, warmup=self.warmup_steps, decay=self.decay_steps, total=self.total_steps
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step and free the gradients, which would otherwise stay during the forward pass, when memory peaks."""
        super().optimizer_step(*args, **kwargs)
        self.net.zero_grad()

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients of the earlier passes, which `training_step` computed; `optimizer_step` frees them."""
        if not self.loss_per_pass:
            super().optimizer_zero_grad(*args, **kwargs)

    def train(self, mode: bool = True) -> LitPSP:
        """Set the mode of every module that is not frozen."""
        super().train(mode)
        if self.batch_norm == "frozen":
            for module in self.net.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    # --- checkpoints: only tensors and plain values, which torch.load(weights_only=True) can read

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return only `net.*`; the networks inside the losses are loaded from their own files."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if key.startswith("net.")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load `state_dict` strictly."""
        state = {key.removeprefix("net."): value for key, value in state_dict.items()}
        return load_strict(self.net, state, what="this run's network")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["psp"] = self.net.describe()
        checkpoint["random_state"] = gather(rng.capture())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        if self._random_state is None:
            rng.offset(self.global_rank)  # each rank draws different noise
        elif len(self._random_state) == self.trainer.world_size:
            rng.restore(self._random_state[self.global_rank])
        self._random_state = None


def _one_number(name: str, metric: Metric) -> float:
    """Compute a metric; raise a UserError if the result is not one number."""
    value = metric.compute()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise UserError(
            f"The metric '{name}': {type(metric).__name__}.compute returned a {type(value).__name__}{shape}. Return "
            "one number; for several, write one metric for each."
        ) from None


def rate_factor(step: int, warmup: int, decay: int, total: int) -> float:
    """Return the learning rate's factor, which rises linearly over the first `warmup` steps and falls along half a
    cosine over the last `decay` steps."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = max(0.0, min(1.0, (total - step) / decay)) if decay else 1.0
    return rise * (0.5 - 0.5 * math.cos(math.pi * left))

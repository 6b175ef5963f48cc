"""IR and IR-SE residual backbones: the body of every encoder and of the face recognition network.

Source: Deng et al., ArcFace (arXiv:1801.07698), section 3.1 (the "improved residual unit"), with the squeeze and
excitation of Hu et al. (arXiv:1709.01507). Module names follow the published IR-SE50 and pSp files, so that their
state dicts load unchanged. Checked against the pSp reference, commit 5cfff38.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psp_lightning.ops.cpu.prelu import prelu
from psp_lightning.ops.dispatch import is_captured
from psp_lightning.utils.errors import UserError

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
}
MODES = ("ir", "ir_se")


def resolve_blocks(n_layers: int, mode: str, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Residual units of the four stages: `blocks` where given, else those of the published depth `n_layers`.

    Raises:
        UserError: for an unknown depth or mode, or where `blocks` is not four positive counts.
    """
    if mode not in MODES:
        raise UserError(f"Unknown backbone mode {mode!r}: choose one of {', '.join(MODES)}.")
    if blocks is not None:
        counts = tuple(int(b) for b in blocks)
        if len(counts) != 4 or min(counts) < 1:
            raise UserError(f"blocks={list(blocks)}: give four positive counts, one a stage, for example [1, 1, 1, 1].")
        return counts
    if n_layers not in BLOCKS:
        depths = ", ".join(str(d) for d in BLOCKS)
        raise UserError(f"Unknown backbone depth n_layers={n_layers}: use one of {depths}, or blocks=[a,b,c,d].")
    return BLOCKS[n_layers]


class PReLU(nn.PReLU):
    """`nn.PReLU` of one slope a channel, faster in training on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return prelu(x, self.weight)


class SqueezeExcite(nn.Module):
    """Channel attention: global average, bottleneck of `channels // 16`, sigmoid gate."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype != torch.float16:  # whose sums are too large for float16
            # the gradient of x.mean would be written out in full, and in another order in memory than x's
            gate = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])  # (B, C, 1, 1)
        else:
            gate = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(gate))).sigmoid()


class ResidualUnit(nn.Module):
    """BN - conv - PReLU - conv(stride) - BN [- SE], plus a shortcut (strided pick, or 1x1 conv where widths differ).

    Attributes:
        checkpointing: keep the input alone for the backward pass and compute the rest again there.
    """

    checkpointing = False

    def __init__(self, in_channels: int, out_channels: int, stride: int, se: bool) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if in_channels == out_channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        layers: list[nn.Module] = [
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
            PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if se:
            layers.append(SqueezeExcite(out_channels))
        self.res_layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointing or not torch.is_grad_enabled() or is_captured():
            return self._sum(x)
        again: Tensor = checkpoint(
            self._sum, x, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _WithoutStatistics(self)),
        )  # fmt: skip
        return again

    def _sum(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class _WithoutStatistics:
    """Within it BatchNorm layers do not count a batch, which they have counted already; it may be entered again.

    One thread at a time: the layers' settings are their own.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.before: list[tuple[Any, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        _one_at_a_time().acquire()
        norms = [m for m in self.unit.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        for norm in norms:
            count = norm.num_batches_tracked
            self.before.append((norm, norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0  # not track_running_stats=False, with which other tensors would be kept than at first

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.before:
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)
        self.before.clear()
        _one_at_a_time().release()


@functools.cache
def _one_at_a_time() -> Any:
    """The lock of `_WithoutStatistics`; made when it is first needed, since importing does no work."""
    return threading.RLock()


def checkpoint_units(encoder: nn.Module) -> None:
    """Let the encoder's residual units keep less memory for the backward pass, for more time.

    Source: Chen et al. (arXiv:1604.06174).

    Raises:
        UserError: where it has none.
    """
    units = [module for module in encoder.modules() if isinstance(module, ResidualUnit)]
    if not units:
        name = type(encoder).__name__
        raise UserError(f"model.checkpointing=true, but {name} has no residual units. Set model.checkpointing=false.")
    for unit in units:
        unit.checkpointing = True


class IRSEBody(nn.Module):
    """Stem and four stages, each of which halves the resolution.

    Base class of the encoders and of `FaceEmbedder`; it holds no head of its own.

    Args:
        in_channels: channels of the input.
        n_layers: published depth, 50, 100 or 152; ignored where `blocks` is given.
        mode: "ir" or "ir_se" (with squeeze and excitation).
        blocks: residual units per stage, for small networks.
        width: channels of the stem; the stages have `width * (1, 2, 4, 8)`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_layers: int = 50,
        mode: str = "ir_se",
        blocks: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        counts = resolve_blocks(n_layers, mode, blocks)
        self.in_channels = in_channels
        self.widths = tuple(width * 2**i for i in range(4))
        self.stage_ends = tuple(sum(counts[: i + 1]) for i in range(4))
        self.input_layer = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), PReLU(width)
        )
        units: list[nn.Module] = []
        channels = width
        for out_channels, count in zip(self.widths, counts, strict=True):
            for i in range(count):
                units.append(ResidualUnit(channels, out_channels, 2 if i == 0 else 1, mode == "ir_se"))
                channels = out_channels
        self.body = nn.Sequential(*units)

    def features(self, x: Tensor) -> list[Tensor]:
        """Outputs of the four stages, at 1/2, 1/4, 1/8 and 1/16 of the input's size.

        Args:
            x: (B, in_channels, H, W) float.
        """
        x = self.input_layer(x)  # (B, width, H, W)
        stages = []
        for i, unit in enumerate(self.body, start=1):
            x = unit(x)
            if i in self.stage_ends:
                stages.append(x)
        return stages


class FaceEmbedder(IRSEBody):
    """Face recognition network: an aligned face to a point on the unit sphere.

    Its state-dict keys are those of `model_ir_se50.pth` (depth 50, "ir_se") and of CurricularFace's IR-101
    (depth 100, "ir").

    Args:
        n_layers, mode, blocks, width: see `IRSEBody`.
        input_size: side of the input in pixels, a multiple of 16.
        embed_dim: length of the embedding.
        affine: whether the last BatchNorm has weights. None follows the published files: with "ir_se", not with "ir".
        dropout: probability before the last linear layer (training only).

    Source: ArcFace (arXiv:1801.07698), section 3.1, output setting "E": BN - dropout - FC - BN.
    """

    def __init__(
        self,
        n_layers: int = 50,
        mode: str = "ir_se",
        input_size: int = 112,
        blocks: Sequence[int] | None = None,
        width: int = 64,
        embed_dim: int = 512,
        affine: bool | None = None,
        dropout: float = 0.4,
    ) -> None:
        super().__init__(3, n_layers, mode, blocks, width)
        if input_size < 16 or input_size % 16:
            raise UserError(f"FaceEmbedder input_size={input_size}: it must be a multiple of 16, published is 112.")
        self.input_size = input_size
        channels = self.widths[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(channels * (input_size // 16) ** 2, embed_dim),
            nn.BatchNorm1d(embed_dim, affine=mode == "ir_se" if affine is None else affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (B, 3, input_size, input_size) float, RGB in [-1, 1].

        Returns:
            (B, embed_dim), each row of L2 norm 1.

        Raises:
            UserError: when the input has another shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, self.input_size, self.input_size):
            raise UserError(
                f"FaceEmbedder takes (B, 3, {self.input_size}, {self.input_size}) images, got {tuple(x.shape)}."
            )
        x = self.input_layer(x)  # (B, 64, 112, 112)
        x = self.body(x)  # (B, 512, 7, 7)
        x = self.output_layer(x)  # (B, 512)
        return x / x.norm(dim=1, keepdim=True)

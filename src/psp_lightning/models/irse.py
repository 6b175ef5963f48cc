"""IR and IR-SE residual backbones, which every encoder and the face recognition network use.

Source: Deng et al., ArcFace (arXiv:1801.07698), section 3.1 (the "improved residual unit"), with the squeeze and
excitation of Hu et al. (arXiv:1709.01507). Module names follow the published IR-SE50 and pSp files, so their state
dicts load unchanged. Checked against the pSp reference, commit 5cfff38.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.ops.cpu.prelu import prelu
from psp_lightning.ops.cpu.spatial_mean import spatial_mean
from psp_lightning.utils.errors import UserError

BLOCKS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}  # residual units of the stages by depth


def _resolve_blocks(n_layers: int, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the residual units of the four stages: `blocks` if given, otherwise the units for the depth `n_layers`."""
    if blocks is not None:
        counts = tuple(map(int, blocks))
        if len(counts) != 4 or min(counts) < 1:
            raise UserError(f"blocks={list(blocks)}: give four positive counts, one per stage, e.g. [1, 1, 1, 1].")
        return counts
    if n_layers not in BLOCKS:
        depths = ", ".join(map(str, BLOCKS))
        raise UserError(f"Unknown backbone depth n_layers={n_layers}: use one of {depths}, or blocks=[a,b,c,d].")
    return BLOCKS[n_layers]


class PReLU(nn.PReLU):
    """`nn.PReLU` with one slope per channel, computed by `prelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return prelu(x, self.weight)


class SqueezeExcite(nn.Module):
    """Channel attention: global average, bottleneck of `channels // 16`, sigmoid gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(spatial_mean(x)))).sigmoid()  # (B, C, 1, 1)
        return x * gate


class ResidualUnit(nn.Module):
    """BN - conv - PReLU - conv(stride) - BN [- SE], plus a shortcut (strided, or a 1x1 conv if widths differ)."""

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
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        return self.res_layer(x) + self.shortcut_layer(x)


class IRSEBody(nn.Module):
    """A stem and four stages, each of which halves the resolution, without a head.

    Raises:
        UserError: an unknown depth or mode, or `blocks` is not four positive counts.
    """

    def __init__(
        self,
        in_channels: int = 3,  # channels of the input
        n_layers: int = 50,  # depth of the published backbones: 50, 100 or 152
        mode: str = "ir_se",  # residual units without ("ir") or with ("ir_se") squeeze and excitation
        blocks: Sequence[int] | None = None,  # residual units of the four stages, instead of n_layers
        width: int = 64,  # channels of the stem; the stages have 1, 2, 4 and 8 times as many
    ) -> None:
        super().__init__()
        if mode not in ("ir", "ir_se"):
            raise UserError(f"Unknown backbone mode {mode!r}: choose one of ir, ir_se.")
        counts = _resolve_blocks(n_layers, blocks)
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
        """Map x (B, in_channels, H, W) to the outputs of the four stages, at 1/2, 1/4, 1/8 and 1/16 of its size."""
        x = self.input_layer(x)  # (B, width, H, W)
        stages = []
        for i, unit in enumerate(self.body, start=1):
            x = unit(x)
            if i in self.stage_ends:
                stages.append(x)
        return stages


class ArcFaceIRSE(IRSEBody):
    """A face recognition network from an aligned face to a point on the unit sphere.

    Its state dict has the keys of `model_ir_se50.pth` (depth 50, "ir_se") and of CurricularFace's IR-101 (depth 100,
    "ir").

    Source: ArcFace (arXiv:1801.07698), section 3.1, output setting "E": BN - dropout - FC - BN.
    """

    def __init__(
        self,
        n_layers: int = 50,  # see `IRSEBody`
        mode: str = "ir_se",  # see `IRSEBody`
        input_size: int = 112,  # side of the input in pixels, a multiple of 16
        blocks: Sequence[int] | None = None,  # see `IRSEBody`
        width: int = 64,  # see `IRSEBody`
        embed_dim: int = 512,  # length of the embedding
    ) -> None:
        super().__init__(3, n_layers, mode, blocks, width)
        if input_size < 16 or input_size % 16:
            raise UserError(f"ArcFaceIRSE input_size={input_size}: it must be a multiple of 16; published is 112.")
        self.input_size = input_size
        channels = self.widths[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(channels * (input_size // 16) ** 2, embed_dim),
            nn.BatchNorm1d(embed_dim, affine=mode == "ir_se"),  # as published
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map faces (B, 3, input_size, input_size), RGB in [-1, 1], to unit vectors (B, embed_dim).

        Raises:
            UserError: the input has another shape.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, self.input_size, self.input_size):
            raise UserError(
                f"ArcFaceIRSE takes (B, 3, {self.input_size}, {self.input_size}) images, got {tuple(x.shape)}."
            )
        x = self.input_layer(x)  # (B, 64, 112, 112)
        x = self.body(x)  # (B, 512, 7, 7)
        x = self.output_layer(x)  # (B, 512)
        return x / x.norm(dim=1, keepdim=True)

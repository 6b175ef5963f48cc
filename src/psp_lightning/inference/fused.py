"""A fast form of a trained encoder: BatchNorm folded into convolutions, and weights in the processor's layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.inference.frozen import freeze_generator, plain_generator
from psp_lightning.models.encoders import StridedConv
from psp_lightning.models.irse import PReLU
from psp_lightning.models.layers import EqualisedLinear, HalfPrecision, freeze
from psp_lightning.models.psp import PSP
from psp_lightning.utils.errors import UserError

CONVOLUTIONS = (nn.Conv2d, StridedConv)  # exact types only: a subclass may compute anything


def for_inference(net: PSP, dtype: torch.dtype, pack: bool) -> PSP:
    """Return a copy of `net` that encodes and decodes faster; see `PSP.for_inference`."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"for_inference supports torch.float32 and torch.bfloat16, not {dtype}.")
    encoder: nn.Module = net.encoder
    if not isinstance(encoder, nn.Identity | FusedEncoder):  # Identity: the network is only a generator
        encoder = FusedEncoder(encoder, dtype, pack)
    generator = copy.deepcopy(plain_generator(net.generator)).to(memory_format=torch.channels_last)
    if dtype != torch.float32 and isinstance(generator, HalfPrecision):
        generator.use_half(16, dtype)
    generator = freeze_generator(generator)
    refiner = None if net.refiner is None else freeze(copy.deepcopy(net.refiner))
    return PSP(encoder, generator, net.latent_avg, net.start_from_latent_avg, net.source, refiner).eval()


class FusedEncoder(nn.Module):
    """A faster equivalent of `encoder` in eval mode, without gradients, and only for the device that it is created on.

    A BatchNorm directly after a convolution in an `nn.Sequential` is folded into the convolution; any other becomes a
    factor and a summand. On the CPU, the first call reorders the weights for oneDNN, and later calls reuse them. The
    map2style heads remain separate convolutions, because one wide convolution and a grouped one were slower there in
    measurements.

    Args:
        encoder: the encoder; it is not changed. Modules other than convolutions, BatchNorm and PReLU are shared.
        dtype: float32 (equal to the encoder up to rounding) or bfloat16; codes are float32 in both cases.
        pack: reorder the weights; torch.compile does not support reordered weights.

    Raises:
        UserError: `config` is read, or the module is moved or cast. Fuse the plain encoder again instead.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype = torch.float32, pack: bool = True) -> None:
        super().__init__()
        self.dtype = dtype
        with torch.no_grad():
            self.network = _fuse(encoder, dtype, pack)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the encoder, such as its sizes and its number of passes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    @property
    def config(self) -> dict[str, Any]:
        raise UserError("A fused encoder is not saved or described: use the network that it was created from.")

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """Map the encoder's inputs to its codes in float32."""
        half = self.dtype if self.dtype != torch.float32 else None
        with torch.autocast(inputs[0].device.type, dtype=half, enabled=half is not None):
            codes = self.network(*[x.contiguous(memory_format=torch.channels_last) for x in inputs])
        return codes.to(torch.float32) if codes.dtype in (torch.bfloat16, torch.float16) else codes


class FoldedConv(nn.Module):
    """A convolution with constant weights that include the following BatchNorm."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype, pack: bool) -> None:
        super().__init__()
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            scale, shift = factors(norm)
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("weight", weight.clone() if weight.data_ptr() == conv.weight.data_ptr() else weight, False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype).clone(), False)
        self.settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.pack = pack and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        self.dtype = dtype
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        stride, padding, dilation, groups = self.settings
        if self._packed is None and self.pack and x.device.type == "cpu" and can_pack(self.dtype):
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = reorder(self.weight, padding, stride, dilation, groups, list(x.shape))
            self.weight = None  # frees the memory
        if self._packed is not None:
            arguments: tuple[Any, ...] = (padding, stride, dilation, groups, "none", [], "")
            return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *arguments)
        assert self.weight is not None
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype != self.dtype or (self._packed is not None and probe.device.type != "cpu"):
            raise UserError("A fused network is not moved or cast: move or cast the plain network, then fuse it again.")
        return super()._apply(fn, recurse)


class Affine(nn.Module):
    """A BatchNorm in eval mode: `x * scale + shift` for each channel."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        scale, shift = factors(norm)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.to(dtype), False)
        self.register_buffer("shift", shift.to(dtype), False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(self.shift.view(shape), x.to(self.scale.dtype), self.scale.view(shape))


class Widened(nn.Module):
    """A small layer that computes in the precision of its weights."""

    def __init__(self, layer: EqualisedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.to(dtype=self.layer.weight.dtype))


def factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute the scale and shift (C,) of a BatchNorm in eval mode in float64; return them in its statistics' dtype."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()  # type: ignore[operator,union-attr]
    scale = (variance + norm.eps).rsqrt()  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * norm.weight.double()  # type: ignore[operator]
    shift = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale  # type: ignore[operator]
    own: torch.dtype = norm.running_mean.dtype  # type: ignore[union-attr,assignment]
    return scale.to(own).detach(), shift.to(own).detach()


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether reordered oneDNN weights can be used; PyTorch's operators for them are not public."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    available = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    half = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return available and (dtype == torch.float32 or half)


def _fuse(module: nn.Module, dtype: torch.dtype, pack: bool) -> nn.Module:
    """Return `module` with faster parts; other modules are shared, or copied one level deep."""
    if type(module) in CONVOLUTIONS:
        return FoldedConv(module, None, dtype, pack)  # type: ignore[arg-type]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        return Affine(module, dtype)
    if isinstance(module, nn.PReLU) and type(module) in (nn.PReLU, PReLU):
        layer = nn.PReLU(module.num_parameters)
        layer.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        return layer
    if isinstance(module, EqualisedLinear):
        return Widened(module)
    parts = dict(module.named_children())
    if not parts:
        return module
    fused = copy.copy(module)
    fused.__dict__.update(_modules={}, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    names = list(parts)
    for i, name in enumerate(names):
        part, after = parts[name], parts[names[i + 1]] if i + 1 < len(names) else None
        if name in fused._modules:  # folded already
            continue
        folds = type(module) is nn.Sequential and type(part) in CONVOLUTIONS
        if folds and isinstance(after, nn.BatchNorm2d) and after.running_mean is not None:
            fused._modules[name] = FoldedConv(part, after, dtype, pack)  # type: ignore[arg-type]
            fused._modules[names[i + 1]] = nn.Identity()
        else:
            fused._modules[name] = _fuse(part, dtype, pack)
    return fused

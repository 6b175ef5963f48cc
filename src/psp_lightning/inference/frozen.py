"""A fast form of a generator with constant weights.

Values that depend only on the weights are computed once: the weights in the dtype and layout of the convolution, the
sums of their squares and, on the CPU in float32, their Winograd transforms. On the CPU a styled layer is one autograd
function that saves one tensor for the backward pass instead of five (`ops/cpu/frozen_conv.py`).

A 1024 px generator has 127 MiB of weights; the derived values need another 133 MiB in float32 at batch 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from psp_lightning.models.layers import ModuleT, freeze
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import FIR_PADDING, Generator, ModulatedConv, StyledConv, ToRGB
from psp_lightning.ops.cpu.frozen_conv import frozen_styled_conv, frozen_to_rgb
from psp_lightning.ops.cpu.winograd import winograd_pays, winograd_weight
from psp_lightning.ops.dispatch import is_captured, use_op
from psp_lightning.ops.modulated_conv import modulated_convolution


def autocast_dtype(precision: object, on_cpu: bool) -> torch.dtype | None:
    """Return the dtype that autocast uses for one of Lightning's precisions; None for a precision without autocast."""
    if precision == "16-mixed" and not on_cpu:
        return torch.float16
    return torch.bfloat16 if precision in ("16-mixed", "bf16-mixed") else None  # bfloat16 for both precisions on a CPU


def freeze_generator(generator: ModuleT, dtype: torch.dtype | None = None) -> ModuleT:
    """Return a faster form of a generator, with the same class, state-dict keys and methods.

    The new module shares the parameters and buffers, which are frozen. It recomputes the values derived from the
    weights when it loads a state dict, is moved or is cast. Do not change weights in place, not even through another
    module that shares them; use `plain_generator` for that. If a parameter is replaced or requires a gradient again,
    the plain layers compute.

    Args:
        generator: a `Generator`; any other network is only frozen. A frozen form is prepared again.
        dtype: the dtype in which autocast will compute; by default the dtype of the weights. Blocks from the resolution
            of `use_half` on use its dtype instead. Calls in another dtype and captured graphs use the plain layers.
    """

    def frozen(layer: nn.Module, resolution: int) -> nn.Module:
        half = generator.is_half(resolution)  # type: ignore[operator]
        return _frozen_layer(layer, generator.half_dtype if half else dtype)  # type: ignore[arg-type]

    return freeze(_with_layers(plain_generator(generator), frozen))


def plain_generator(generator: ModuleT) -> ModuleT:
    """Return the plain form of a generator from `freeze_generator`, with the same parameters, still frozen.

    Use it to compile or export a graph, or to train the weights again.
    """
    return freeze(plain_form(generator))


def plain_form(generator: ModuleT) -> ModuleT:
    """Return the plain form of a generator and freeze nothing."""
    return _with_layers(generator, lambda layer, _: getattr(layer, "plain", (layer,))[0])


def freeze_psp_generator(net: PSP, dtype: torch.dtype | None = None) -> PSP:
    """Replace the generator of `net` with its frozen form and return `net`; see `freeze_generator`."""
    net.generator = freeze_generator(net.generator, dtype)
    return net


def _with_layers(generator: ModuleT, change: Callable[[nn.Module, int], nn.Module]) -> ModuleT:
    """Return a shallow copy in which `change(layer, resolution)` replaces each layer."""
    if not isinstance(generator, Generator):
        return generator
    other = copy.copy(generator)
    other.__dict__ |= {key: copy.copy(value) for key, value in generator.__dict__.items() if "_hooks" in key}
    other._modules = dict(generator._modules)
    other.__dict__.pop("train", None)  # the method is bound to the original
    other.conv1, other.to_rgb1 = change(generator.conv1, 4), change(generator.to_rgb1, 4)  # type: ignore[assignment]
    other.convs = nn.ModuleList(change(layer, 8 << i // 2) for i, layer in enumerate(generator.convs))
    other.to_rgbs = nn.ModuleList(change(layer, 8 << i) for i, layer in enumerate(generator.to_rgbs))
    return other


def _frozen_layer(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return the frozen form of a layer, or the layer if its class is a subclass, which may compute anything."""
    if type(layer) not in (StyledConv, ToRGB):
        return layer
    frozen = FrozenStyledConv.__new__(FrozenStyledConv) if type(layer) is StyledConv else ToRGB.__new__(ToRGB)
    _share(frozen, layer)
    frozen._modules["conv"] = FrozenConv(layer.conv, dtype)  # type: ignore[arg-type]
    frozen.__dict__["plain"] = (layer,)  # in a tuple, so that it is not a submodule
    return frozen


def _share(frozen: nn.Module, plain: nn.Module) -> None:
    """Give `frozen` the content and parameter dict of `plain`, so that both see a parameter that PyTorch replaces."""
    nn.Module.__init__(frozen)
    frozen.__dict__ = {**plain.__dict__, **frozen.__dict__, "_parameters": plain._parameters}
    frozen._modules = dict(plain._modules)
    frozen.__dict__.pop("train", None)


class FrozenConv(ModulatedConv):
    """A modulated convolution with constant weights.

    Buffers (not saved):
        prepared_weight: the weight in the chosen dtype, (O, I, k, k), or (I, O, k, k) if it upsamples.
        weight_sq_sum: (O, I), squared weights summed over the taps, float32 or wider.
        winograd_weight: (36, O, I) float32, see `transform`; None until it is needed.
    """

    prepared_weight: Tensor
    weight_sq_sum: Tensor
    winograd_weight: Tensor | None

    def __init__(self, plain: ModulatedConv, dtype: torch.dtype | None) -> None:
        _share(self, plain)
        self.dtype = dtype
        self.prepare()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the buffers from the weight."""
        self.__dict__["prepared_from"] = self.weight
        weight, up = self.weight, self.blur is not None
        with torch.autocast(weight.device.type, enabled=False):
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            prepared = weight.detach().to(self.dtype or weight.dtype)
            prepared = prepared.transpose(0, 1).contiguous() if up else prepared
            self.register_buffer("prepared_weight", prepared, persistent=False)
            self.register_buffer("weight_sq_sum", wide.square().sum((2, 3)), persistent=False)
            self.register_buffer("winograd_weight", None, persistent=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def transform(self) -> Tensor:
        """Return the weight as `winograd_conv` needs it, computed when first needed.

        It has four times the size of the weight. At 1024 px and batch 1, three of nine layers need it.
        """
        if self.winograd_weight is None:
            self.winograd_weight = winograd_weight(self.weight)
        return self.winograd_weight

    def serves(self, x: Tensor) -> bool:
        """Return whether the buffers are valid for a call with x."""
        weight = self.weight
        unchanged = weight is self.__dict__["prepared_from"] and not weight.requires_grad
        same_device = weight.device == self.prepared_weight.device
        return unchanged and same_device and not is_captured() and active_dtype(x) == self.prepared_weight.dtype

    def style(self, w: Tensor) -> Tensor:
        """Return the scale of each input channel, (B, in_channels).

        It includes the equalised learning rate, because scaling the style is cheaper than scaling the weights.
        """
        with torch.autocast(w.device.type, enabled=False):
            style = self.modulation(w.to(self.modulation.weight.dtype)) * self.scale
        return style.to(torch.promote_types(style.dtype, torch.float32))

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.serves(x):
            return super().forward(x, w)
        if not self.demodulate and on_cpu(x):  # ToRGB
            return frozen_to_rgb(x.to(self.prepared_weight.dtype), self.style(w), self.weight), None
        up = self.blur is not None
        weight = self.prepared_weight.transpose(0, 1) if up else self.prepared_weight
        return modulated_convolution(x, weight, self.style(w), self.demodulate, up, self.weight_sq_sum)

    # Recompute the buffers after the module was moved, cast, loaded, copied or unpickled.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenConv:
        self._buffers.clear()
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


class FrozenStyledConv(StyledConv):
    """A styled layer with constant weights."""

    conv: FrozenConv

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, clamp: float | None = None) -> Tensor:
        conv, values = self.conv, (noise, self.noise["weight"], self.activate["bias"])
        learned = any(value is not None and value.requires_grad for value in values)
        if clamp is not None or learned or not on_cpu(x) or not conv.serves(x):
            return super().forward(x, w, noise, clamp)
        x = x.to(conv.prepared_weight.dtype)
        batch, _, height, width = x.shape
        fir, up = (None, 1) if conv.blur is None else (conv.blur.taps, 2)
        if noise is None:
            noise = x.new_empty(batch, 1, height * up, width * up).normal_()
        noise = self.noise["weight"] * noise
        transform = conv.transform() if conv.blur is None and winograd_pays(x, conv.weight) else None
        constants = (conv.prepared_weight, conv.weight_sq_sum, noise, self.activate["bias"], fir, FIR_PADDING)
        return frozen_styled_conv(x, conv.style(w), *constants, winograd_weight=transform)


def on_cpu(x: Tensor) -> bool:
    """Return whether plain CPU kernels compute with x, not an operator of `ops` or a subclass like FakeTensor."""
    return x.device.type == "cpu" and type(x) is Tensor and not use_op(x)


def active_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of x computes: autocast's dtype if autocast is on, otherwise x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

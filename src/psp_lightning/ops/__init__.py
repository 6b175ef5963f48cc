"""Tensor operations of StyleGAN2 in plain PyTorch: no compiler, any device, any order of derivative."""

from psp_lightning.ops.bias_act import fused_leaky_relu
from psp_lightning.ops.modulated_conv import demodulation, modulated_conv2d
from psp_lightning.ops.upfirdn import fir_kernel, upfirdn2d

__all__ = ["demodulation", "fir_kernel", "fused_leaky_relu", "modulated_conv2d", "upfirdn2d"]

"""Tensor operations of StyleGAN2.

Plain PyTorch on the CPU and wherever no CUDA compiler exists: any device, any order of derivative. On CUDA the kernels
of `cuda/csrc/`, built when they are first needed; `$PSP_OPS` chooses, docs/kernels.md explains.
"""

from psp_lightning.ops.bias_act import fused_leaky_relu
from psp_lightning.ops.epilogue import modconv_epilogue
from psp_lightning.ops.modulated_conv import modulated_convolution
from psp_lightning.ops.upfirdn2d import fir_filter, upfirdn2d

__all__ = [
    "fir_filter",
    "fused_leaky_relu",
    "modconv_epilogue",
    "modulated_convolution",
    "upfirdn2d",
]

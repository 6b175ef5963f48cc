"""Tensor operations of StyleGAN2.

Plain PyTorch on the CPU and wherever no CUDA compiler is: any device, any order of derivative. On CUDA the kernels of
`csrc/`, built when they are first needed; `$PSP_OPS` chooses, docs/kernels.md tells all.
"""

import psp_lightning.ops.library  # noqa: F401  declares the operators to torch.library
from psp_lightning.ops.bias_act import fused_leaky_relu
from psp_lightning.ops.epilogue import modconv_epilogue
from psp_lightning.ops.modulated_conv import blur_padding, demodulation, modulated_conv2d, modulated_convolution
from psp_lightning.ops.upfirdn2d import fir_kernel, upfirdn2d

__all__ = [
    "blur_padding",
    "demodulation",
    "fir_kernel",
    "fused_leaky_relu",
    "modconv_epilogue",
    "modulated_conv2d",
    "modulated_convolution",
    "upfirdn2d",
]

"""The tensor operations of StyleGAN2.

Without CUDA or its compiler they are plain PyTorch, for any device and any order of derivative. On CUDA they use the
kernels of `cuda/csrc/`, which are built at their first use. `$PSP_OPS` selects between them, see docs/kernels.md.
"""

from psp_lightning.ops.bias_act import fused_leaky_relu
from psp_lightning.ops.epilogue import modconv_epilogue
from psp_lightning.ops.modulated_conv import modulated_convolution
from psp_lightning.ops.upfirdn2d import fir_filter, upfirdn2d

__all__ = ["fir_filter", "fused_leaky_relu", "modconv_epilogue", "modulated_convolution", "upfirdn2d"]

"""Compiles the kernels into a folder, in a process of its own: `python -m psp_lightning.ops.cuda.compile FOLDER`.

A process of its own since torch.utils.cpp_extension reads CUDA_HOME when it is imported, and because it loads the
library once linked: what cannot be loaded ends this process and not the training.
"""

from __future__ import annotations

import sys

from psp_lightning.ops.cuda import toolchain as _toolchain


def main() -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        name=_toolchain.NAME,
        sources=[str(path) for path in _toolchain.compiled_files()],
        extra_cflags=list(_toolchain.CFLAGS),
        extra_cuda_cflags=list(_toolchain.CUDA_CFLAGS),
        build_directory=sys.argv[1],
        with_cuda=True,
        is_python_module=False,
        verbose=True,
    )


if __name__ == "__main__":
    main()

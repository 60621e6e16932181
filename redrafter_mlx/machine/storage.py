"""Where files made on this machine are kept, and how they get there whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from redrafter_mlx.errors import UserError

CACHE_VARIABLE = "REDRAFTER_MLX_CACHE"

logger = logging.getLogger("redrafter_mlx")
NOT_WAITED_FOR = "redrafter_mlx download"
"""Name of a thread whose work ends with the command; Python waits for its threads otherwise."""


def cache_directory() -> Path:
    """Where downloads and conversions are kept: $REDRAFTER_MLX_CACHE or the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "redrafter_mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redrafter_mlx"


def conversions() -> Path:
    """Where converted models are kept."""
    return cache_directory() / "models"


def build_once(destination: Path, build: Callable[[Path], None], what: str = "model") -> Path:
    """Fill `destination` with `build(directory)`, unless that was done before.

    Other processes wait. The directory appears complete or not at all.

    what  is built, for the error
    """
    if destination.is_dir():
        return destination
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination, what):
            if not destination.is_dir():
                _fill(destination, build)
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError
        raise UserError(
            f"no {what} could be written to the cache {destination.parent}: {one_line(error)}; set "
            f"{CACHE_VARIABLE} to a writable directory with room"
        ) from error
    return destination


def _locked(destination: Path, what: str) -> AbstractContextManager:
    """Keeps other processes out of a destination; logs it if another one must be waited for."""
    lock = FileLock(f"{destination}.lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        logger.info("another run is making the %s %s: waiting for it", what, destination.name)
        return lock.acquire()


def _fill(destination: Path, build: Callable[[Path], None]) -> None:
    prefix = f"{destination.name}.tmp-"
    for path in destination.parent.iterdir():
        if path.name.startswith(prefix):
            # Its maker held the lock that we hold now, so it was killed. A program that it had
            # started may still be writing there.
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as scratch:
        complete = Path(scratch) / "model"
        complete.mkdir()
        build(complete)
        os.replace(complete, destination)


def write_whole(path: Path, text: str, private: bool = False) -> None:
    """Write a file that appears whole or not at all; OSError if it cannot.

    private  only the user may read it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{uuid4().hex}.tmp")
    mode = 0o600 if private else 0o666  # less what the user's umask forbids
    try:
        with open(scratch, "x", encoding="utf-8", opener=partial(os.open, mode=mode)) as file:
            file.write(text)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Make `directory` and keep other processes out of it while the block runs.

    Raises UserError when another process is in it, or when it cannot be made.
    """
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{directory} is in use by another run; wait for it or give another directory"
        ) from error
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {one_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


def one_line(error: Exception) -> str:
    """The error on one line; of a long one its beginning and its end, where compilers say why."""
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = f"{text[:200]} ... {text[-200:]}"
    return text.rstrip(".") or type(error).__name__

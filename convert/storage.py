"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line

ABANDONED = 3600  # seconds after which a directory without a lock has lost its maker
_LOCK, _INSIDE = "lock", "directory"


def check_destination(path: Path, force: bool, *sources: Path) -> None:
    """Refuse a destination that holds something, or that is being read from."""
    for source in sources:
        if path.exists() and path.resolve() == source.resolve():
            raise UserError(f"--output {path} is the input; give another directory")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--output {path} exists and is not a directory; give another one")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise UserError(f"--output {path} exists; give another directory, or --force to replace it")
    if not (path / "config.json").is_file():
        raise UserError(f"--output {path} is not a model, so --force does not replace it")


@contextmanager
def build(path: Path, force: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `path` when the block succeeds.

    On an exception, Ctrl-C included, nothing is left. A killed process leaves a directory
    `.NAME.tmp-*` beside `path`, which the next run with the same `path` removes.
    """
    try:
        made = _make_parents(path.parent)
        prefix = f".{path.name}.tmp-"
        _remove_abandoned(path.parent, prefix)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {_reason(error)}") from error
    done = False
    try:
        with FileLock(scratch / _LOCK):
            inside = scratch / _INSIDE
            inside.mkdir()
            yield inside
            _move(inside, path, scratch, force)
            done = True
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {_reason(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not done:
            for parent in made:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing directories; returns them, the innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
    return missing


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed runs have left behind: nobody holds its lock."""
    for left in parent.iterdir():
        if left.name.startswith(prefix) and left.is_dir() and not left.is_symlink():
            lock = left / _LOCK
            if lock.exists():
                # another run may be at work there just now
                with suppress(Timeout), FileLock(lock, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            elif time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _move(built: Path, path: Path, scratch: Path, force: bool) -> None:
    old = scratch / "replaced"
    replaces = path.is_dir() and any(path.iterdir())
    if replaces and not force:
        raise UserError(f"--output {path} has appeared in the meantime; give another directory")
    if replaces:
        os.replace(path, old)
    try:
        os.replace(built, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise


def _reason(error: OSError) -> str:
    return error.strerror or one_line(error)

"""The texts that an engine keeps, saved in files, so that the next start is warm.

There is one file for each text, named after its model and its tokens. It is written under another
name and renamed when it is complete, so a crash leaves the older files intact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from redrafter_mlx.engine.prefixes import Prefix
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.measuring.profile import identify
from redrafter_mlx.target.adapter import STEPS_BACK, Target
from redrafter_mlx.target.cache import TreeCache

FORMAT = "redrafter-mlx prefix 1"
_log = logging.getLogger("redrafter_mlx")


def save_prefixes(directory: Path, prefixes: Iterable[Prefix], target: Target) -> None:
    """Store these texts in the directory, and delete all others of the same model.

    Raises UserError, with the older files in place, if they cannot be written.
    """
    model = identify(target, None)["model"]
    kept = {_path(directory, model, prefix.said): prefix for prefix in prefixes}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob(f".prefix-{_digest(model.encode())}-*"):
            unfinished.unlink(missing_ok=True)  # left by a process that was killed
        for path, prefix in kept.items():
            if not path.exists():
                _write(path, prefix, model)
        for path in set(_files(directory, model)) - kept.keys():
            path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # mlx raises RuntimeError on a full disk
        raise UserError(f"prefixes cannot be saved in {directory}: {one_line(error)}") from error


def load_prefixes(directory: Path, target: Target) -> Iterator[Prefix]:
    """The texts of this model in the directory; unreadable files are skipped with a warning."""
    model = identify(target, None)["model"]
    for path in sorted(_files(directory, model), key=lambda path: path.stat().st_mtime):
        try:
            yield _read(path, target, model)
        except Exception as error:  # whatever mlx raises on arbitrary bytes
            _log.warning("%s is left out: %s", path, one_line(error))


def _files(directory: Path, model: str) -> list[Path]:
    return list(directory.glob(f"prefix-{_digest(model.encode())}-*.safetensors"))


def _path(directory: Path, model: str, said: Sequence[int]) -> Path:
    tokens = _digest(",".join(map(str, said)).encode())
    return directory / f"prefix-{_digest(model.encode())}-{tokens}.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _write(path: Path, prefix: Prefix, model: str) -> None:
    arrays, starts = {}, {}
    for place, cache in enumerate(prefix.caches.branching):
        if isinstance(cache, TreeCache):
            starts[place] = cache.start_position
            held = () if cache.keys is None else cache.keys_and_values()
        else:
            held = cache.state
        arrays |= {f"{place}.{slot}": x for slot, x in enumerate(held) if x is not None}
    about = {
        "format": FORMAT,
        "model": model,
        "said": json.dumps(list(map(int, prefix.said))),
        "length": str(prefix.caches.length),
        "starts": json.dumps(starts),
    }
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(unfinished), arrays, about)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, target: Target, model: str) -> Prefix:
    arrays, about = mx.load(str(path), return_metadata=True)
    if about.get("format") != FORMAT or about.get("model") != model:
        raise ValueError("it is not of this version or of this model")
    said, length = json.loads(about["said"]), int(about["length"])
    starts = json.loads(about["starts"])
    caches = target.empty_caches(steps_back=STEPS_BACK)
    for place, cache in enumerate(caches.branching):
        if not isinstance(cache, TreeCache):
            cache.restore([arrays.get(f"{place}.{slot}") for slot in range(len(cache.state))])
        elif f"{place}.0" in arrays:
            keys, values, start = arrays[f"{place}.0"], arrays[f"{place}.1"], starts[str(place)]
            if keys.shape[2] != length - start or values.shape[:3] != keys.shape[:3]:
                raise ValueError(f"layer {place} holds {keys.shape[2]} places of {length}")
            cache.restore(keys, values, start, length)
    if not 0 < length < len(said):
        raise ValueError(f"{len(said)} tokens cannot leave caches of {length}")
    caches.begin_at(length)
    return Prefix(said, caches, None, "")

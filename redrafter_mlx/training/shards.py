"""Conversations on disk, as the target wrote them: safetensors files for each batch of rows.

A shard holds T tokens of several conversations end to end:

    tokens      (T,)    int32
    roles       (T,)    uint8, see `lockstep.Role`
    starts      (n,)    int32 first token of each conversation
    hidden      (T, E)  the target's hidden state after each token, 16 bits
    top_ids     (T, K)  int32 the likeliest next tokens, in no order
    top_logits  (T, K)  float16 their logits less the highest

Some whole conversations of each batch go into a file of their own and are never trained on. A
file appears complete or not at all, so a killed run loses the batch that was under way.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.lockstep import Conversation

HELD_OUT_EVERY = 16
"""One conversation of so many is held out."""
_NUMPY = {"I32": np.int32, "U8": np.uint8, "F16": np.float16, "BF16": np.uint16}
COLUMNS = ("tokens", "roles", "hidden", "top_ids", "top_logits")


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05}.safetensors"


def held_out_path(directory: Path, number: int) -> Path:
    return directory / f"held-out-{number:05}.safetensors"


def part_path(directory: Path, job: int) -> Path:
    """Where one of several jobs writes."""
    return directory / f"part-{job}"


def parts(directory: Path) -> list[Path]:
    """The directories of the jobs that wrote the data, in order."""
    return sorted(directory.glob("part-*"), key=lambda path: int(path.name.removeprefix("part-")))


def training_shards(directories: Sequence[Path]) -> list[Path]:
    """The files to train on, in order."""
    return [shard_path(d, number) for d in directories for number in range(shard_count(d))]


def held_out_shards(directories: Sequence[Path]) -> list[Path]:
    """The files of conversations to evaluate on, in order: one conversation of 16."""
    paths = (held_out_path(d, number) for d in directories for number in range(shard_count(d)))
    return [path for path in paths if path.exists()]


def shard_count(directory: Path) -> int:
    """Batches that are complete."""
    number = 0
    while shard_path(directory, number).exists():
        number += 1
    return number


def write_shard(
    path: Path, conversations: Sequence[Conversation], metadata: dict[str, str]
) -> None:
    """Write the conversations, one or more, to `path`: whole or not at all."""
    lengths = [len(c.tokens) for c in conversations]
    arrays = {
        name: mx.concatenate([mx.array(getattr(c, name)) for c in conversations])
        for name in COLUMNS
    }
    arrays["starts"] = mx.array(np.cumsum([0, *lengths[:-1]]).astype(np.int32))
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays, metadata)
        if partial.stat().st_size < sum(array.nbytes for array in arrays.values()):
            raise OSError(f"{partial} was cut short")  # not every mlx reports a full disk
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_batch(
    directory: Path, number: int, conversations: Sequence[Conversation], metadata: dict[str, str]
) -> None:
    """Write a batch's conversations, one or more.

    The held-out ones come first: the other file is what marks a batch as complete.
    """
    held_out = conversations[1::HELD_OUT_EVERY]
    rest = [c for i, c in enumerate(conversations) if i % HELD_OUT_EVERY != 1]
    if held_out:
        write_shard(held_out_path(directory, number), held_out, {})
    write_shard(shard_path(directory, number), rest, metadata)


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard, mapped into memory; bfloat16 as uint16. UserError if it is damaged."""
    try:
        header, begin = _header(path)
        file = np.memmap(path, np.uint8, "r")  # once: each mapping keeps a file open
        arrays = {
            name: _part(file, begin, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        length = len(arrays["tokens"])
        wrong = [name for name in COLUMNS if len(arrays[name]) != length]
        if wrong or not len(arrays["starts"]):
            raise ValueError(f"its {', '.join(wrong) or 'starts'} do not fit its tokens")
        return arrays
    except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
        raise UserError(
            f"{path} is not a complete shard of training data ({type(error).__name__}: {error}); "
            "delete it and all later ones, they will be written again"
        ) from error


def conversations(shard: dict[str, np.ndarray]) -> Iterator[tuple[int, int]]:
    """First token and end of each conversation of a mapped shard."""
    return itertools.pairwise([*shard["starts"].tolist(), len(shard["tokens"])])


def as_mlx(hidden: np.ndarray) -> mx.array:
    """Hidden states of a mapped shard, or a part of them, as an array of mlx."""
    array = mx.array(hidden)
    return array.view(mx.bfloat16) if hidden.dtype == np.uint16 else array


def _part(file: np.ndarray, begin: int, entry: dict) -> np.ndarray:
    first, last = entry["data_offsets"]
    if begin + last > len(file):
        raise ValueError(f"it ends {begin + last - len(file)} bytes early")
    return np.ndarray(tuple(entry["shape"]), _NUMPY[entry["dtype"]], file, begin + first)


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file and where its data begin."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > path.stat().st_size:
            raise ValueError("no safetensors header")
        return json.loads(file.read(size)), 8 + size


def shard_metadata(path: Path) -> dict[str, str]:
    """What was noted with a shard; UserError if it is damaged."""
    map_shard(path)
    return _header(path)[0].get("__metadata__") or {}

"""Safetensors files read in rows, their header checked before anything is allocated.

Format: 8 bytes with the length of the header, the header in JSON, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.drafters.tensors import looks_pickled
from redrafter_mlx.errors import UserError

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
"""Types of tensors; bfloat16, which numpy lacks, as its bits."""

LONGEST_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_BYTES = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that stays in its file until its rows are asked for.

    dtype  safetensors' name of the type
    rows   (start, stop) along the first axis -> array; bfloat16 as uint16
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]

    def whole(self) -> np.ndarray:
        """All of it; for small tensors."""
        return self.rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises UserError, and says why, for anything that is not a complete safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start, first = opened.read(8), opened.read(1)
            if looks_pickled(start + first):
                raise UserError(f"{file}: is a pickled PyTorch file; rename it to model.pt")
            length = int.from_bytes(start, "little")
            if fault := _length_fault(size, start, length):
                raise _damaged(file, fault)
            header = _parse(file, first + opened.read(length - 1) if length else b"")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    header.pop("__metadata__", None)
    base, end = 8 + length, 0
    tensors = {}
    entries = {name: _entry(file, name, entry) for name, entry in header.items()}
    for name, (dtype, shape, (begin, stop)) in sorted(entries.items(), key=lambda e: e[1][2]):
        if begin != end:
            fault = "overlaps the one before it" if begin < end else "leaves a gap before it"
            raise _damaged(file, f"the data of {name} {fault}")
        end = stop
        tensors[name] = _tensor(file, name, dtype, shape, base + begin)
    if base + end != size:
        raise _damaged(file, f"its header describes {base + end} bytes, it has {size}")
    return tensors


def _length_fault(size: int, start: bytes, length: int) -> str | None:
    if len(start) < 8:
        return f"it has {size} bytes"
    if length > LONGEST_HEADER or length > size - 8:
        return f"its header claims {length} bytes, the file has {size}"
    return None


def _parse(file: Path, data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _damaged(file, f"its header has {twice} twice")
        return found

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    return header


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and place of a tensor; place and size agree."""
    number = lambda value: type(value) is int and 0 <= value < 2**63
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        raise _damaged(file, f"its header says nothing useful of {name}")
    dtype, shape, offsets = (entry[key] for key in keys)
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _damaged(file, f"{name} has the unknown type {dtype!r}")
    if not isinstance(shape, list) or not all(map(number, shape)):
        raise _damaged(file, f"{name} has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(number, offsets)):
        raise _damaged(file, f"{name} lies at {offsets!r}")
    needed, found = math.prod(shape) * _BYTES[dtype], offsets[1] - offsets[0]
    if needed != found:
        raise _damaged(file, f"{name} has {found} bytes, its shape {shape} needs {needed}")
    return dtype, tuple(shape), tuple(offsets)


def _tensor(file: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
    row = math.prod(shape[1:])

    def rows(start: int, stop: int) -> np.ndarray:
        kind = NUMPY[dtype]
        place = offset + start * row * _BYTES[dtype]
        found = np.fromfile(file, kind, (stop - start) * row, offset=place)
        if len(found) < (stop - start) * row:
            raise _damaged(file, f"it ends in {name}: it has become shorter")
        return found.reshape((stop - start, *shape[1:]))

    return Tensor(name, shape, dtype, file, rows)


def _damaged(file: Path, fault: str) -> UserError:
    return UserError(f"{file}: is not a complete safetensors file: {fault}; get it again")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


class Writer:
    """Writes a safetensors file piece by piece; the tensors may be filled in any order."""

    def __init__(self, file: Path, entries: list[Entry]):
        ordered = sorted(entries, key=lambda entry: (-_BYTES[entry.dtype], entry.name))
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        self._place: dict[str, int] = {}
        self._left: dict[str, int] = {}
        place = 0
        for entry in ordered:
            span = [place, place + entry.nbytes]
            self._place[entry.name], self._left[entry.name] = place, entry.nbytes
            header[entry.name] = {
                "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span,
            }  # fmt: skip
            place = span[1]
        encoded = json.dumps(header, ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._base = 8 + len(encoded)
        self._file = file.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if kind is None and any(self._left.values()):
            short = [name for name, left in self._left.items() if left]
            raise RuntimeError(f"not written in full: {short}")

    def write(self, name: str, piece: np.ndarray) -> None:
        """Append rows to a tensor."""
        self._file.seek(self._base + self._place[name])
        self._file.write(np.ascontiguousarray(piece).data)
        self._place[name] += piece.nbytes
        self._left[name] -= piece.nbytes

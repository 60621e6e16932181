"""Reads the header of GGUF files: the metadata and the table of tensors, not their contents."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML's

# GGUF's numbers for the types of metadata values.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# GGML's numbers for the types of tensors.
TENSOR_TYPES = {
    **dict(enumerate(["F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0"])),
    **dict(enumerate(["Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"], 9)),
    **dict(enumerate(["IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S"], 16)),
    **dict(enumerate(["IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"], 23)),
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}


@dataclass(frozen=True)
class TensorInfo:
    """The table's entry for one tensor.

    Attributes:
        shape: outermost dimension first, as in NumPy (GGUF writes the innermost first).
        kind: name of the GGML type, such as Q4_0; `type 99` if its number is unknown.
        start: offset of the first byte in the file.
    """

    shape: tuple[int, ...]
    kind: str
    start: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file.

    Attributes:
        path: for error messages.
        content: (bytes,) uint8, mapped from the disk.
        metadata: numbers, booleans, strings and lists of them.
        tensors: by name, in the order of the file.
    """

    path: Path
    content: np.ndarray
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def need(self, key: str) -> Any:
        """The metadata value under `key`; UserError if the file lacks it."""
        if key not in self.metadata:
            raise UserError(f"{self.path}: the GGUF metadata has no {key}; get a complete file")
        return self.metadata[key]

    def need_text(self, key: str) -> str:
        """The string under `key`; UserError if it is missing or not a string."""
        value = self.need(key)
        if not isinstance(value, str):
            raise UserError(
                f"{self.path}: {key} must be a string in the GGUF metadata, not {value!r}; get the "
                "file again"
            )
        return value

    def need_list(self, key: str, element: type) -> list[Any]:
        """The list under `key`; UserError if it is missing, empty or holds another type."""
        values = self.need(key)
        if not isinstance(values, list) or not values or type(values[0]) is not element:
            raise UserError(
                f"{self.path}: {key} must be a list of {element.__name__} in the GGUF metadata; "
                "get the file again"
            )
        return values


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        UserError: no such file, not GGUF, an unsupported version, or a damaged header.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        content = np.memmap(path, np.uint8, mode="r")
        return _parse(path, content)
    except (OSError, ValueError, struct.error, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a readable GGUF file ({reason}); get it again") from error


def _parse(path: Path, content: np.ndarray) -> GgufFile:
    cursor = _Cursor(content)
    _check_version(cursor)
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(value_count)}
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    table = [_tensor(cursor) for _ in range(tensor_count)]
    data = math.ceil(cursor.at / alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, data + start) for name, shape, kind, start in table}
    if len(tensors) != len(table):
        raise ValueError("two tensors have the same name")
    return GgufFile(path, content, metadata, tensors)


def _check_version(cursor: _Cursor) -> None:
    magic, version = cursor.take(4).tobytes(), cursor.number("I")
    if magic != b"GGUF":
        raise ValueError(f"it starts with {magic!r}")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; only little-endian {VERSIONS} are supported")


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    sizes = cursor.numbers("Q", dimensions)
    kind, start = cursor.number("I"), cursor.number("Q")
    return name, tuple(reversed(sizes)), TENSOR_TYPES.get(kind, f"type {kind}"), start


class _Cursor:
    """Reads the header in order; ValueError if it claims to be longer than the file."""

    def __init__(self, content: np.ndarray):
        self.content = content
        self.at = 0

    def take(self, size: int) -> np.ndarray:
        end = self.at + size
        if end > len(self.content):
            raise ValueError(f"its header ends at byte {end}, the file at {len(self.content)}")
        taken = self.content[self.at : end]
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> list[Any]:
        data = self.take(count * struct.calcsize(f"<{code}"))
        return np.frombuffer(data.tobytes(), np.dtype(f"<{code}")).tolist()

    def text(self) -> str:
        return self.take(self.number("Q")).tobytes().decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.values(self.number("I"), self.number("Q"))
        return self.values(kind, 1)[0]

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a metadata value of type {kind}")
        return self.numbers(NUMBERS[kind], count)

"""The numbers in a GGUF file's metadata that belong to its architecture.

A number that is missing without a default, or is not of its kind, raises UserError.
"""

from __future__ import annotations

import math

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import GgufFile


def key(file: GgufFile, name: str) -> str:
    """block_count -> llama.block_count"""
    return f"{file.need_text('general.architecture')}.{name}"


def count(file: GgufFile, name: str, default: int | None = None) -> int:
    """The whole number >= 1 under `name`."""
    value = _value(file, name, default)
    if type(value) is not int or value < 1:
        raise unsupported(file, f"{key(file, name)} = {value!r}")
    return value


def number(file: GgufFile, name: str, default: float | None = None) -> float:
    """The finite number > 0 under `name`."""
    value = _value(file, name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise unsupported(file, f"{key(file, name)} = {value!r}")
    return float(value)


def unsupported(file: GgufFile, what: str) -> UserError:
    """The error for something that models may have but the import does not support."""
    return UserError(
        f"{file.path}: {what} is not supported by the GGUF import: use an MLX copy of this model"
    )


def _value(file: GgufFile, name: str, default: float | None) -> object:
    full = key(file, name)
    return file.need(full) if default is None else file.metadata.get(full, default)

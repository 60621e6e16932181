"""Tensors of a GGUF file in MLX's layout, bit for bit the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import GgufFile

GROUP_SIZE = 32  # weights per block in Q4_0, Q4_1 and Q8_0

Parts = dict[str, np.ndarray]


def read_tensor(file: GgufFile, name: str) -> Parts:
    """The contents of one tensor.

    Args:
        file: the file.
        name: a tensor of shape (..., columns) in it.

    Returns:
        For F32 and F16: `weight` (..., columns) of that type. For the quantised types MLX's affine
        layout, value = scale * code + bias: `weight` (..., columns * bits / 32) uint32, with the
        first code in the lowest bits; `scales` and `biases` (..., columns / 32) float16.

    Raises:
        UserError: another type, a file that ends too early, or values that are not finite.

    Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0 and so on)
    """
    shape = file.tensors[name].shape
    layout = _layout(file, name)
    blocks = _blocks(file, name, layout)
    parts = {part: array.reshape(*shape[:-1], -1) for part, array in layout.unpack(blocks).items()}
    for array in parts.values():
        if array.dtype != np.uint32 and not np.isfinite(array).all():
            raise UserError(
                f"{file.path}: tensor {name} holds numbers that are not finite in "
                f"{array.dtype}; get the file again"
            )
    return parts


def check_tensor(file: GgufFile, name: str) -> None:
    """Raise UserError unless `read_tensor` knows the tensor's type and the file holds its bytes."""
    _blocks(file, name, _layout(file, name))


def quantised_bits(file: GgufFile, name: str) -> int | None:
    """Bits per code of a quantised tensor; None if it holds floats."""
    return _layout(file, name).bits


@dataclass(frozen=True)
class _Layout:
    """How one GGML type is stored: `unpack` takes blocks (count, bytes) uint8."""

    weights: int
    bytes: int
    bits: int | None
    unpack: Callable[[np.ndarray], Parts]


def _layout(file: GgufFile, name: str) -> _Layout:
    kind = file.tensors[name].kind
    if kind not in LAYOUTS:
        raise UserError(
            f"{file.path}: tensor {name} is {kind}, which cannot be imported unchanged; use a "
            f"file of {', '.join(LAYOUTS)} only"
        )
    return LAYOUTS[kind]


def _blocks(file: GgufFile, name: str, layout: _Layout) -> np.ndarray:
    info = file.tensors[name]
    if not info.shape or info.shape[-1] % layout.weights:
        raise UserError(
            f"{file.path}: tensor {name} has shape {info.shape}, but {info.kind} comes in blocks "
            f"of {layout.weights}; get the file again"
        )
    count = math.prod(info.shape) // layout.weights
    end = info.start + count * layout.bytes
    if end > len(file.content):
        raise UserError(
            f"{file.path}: tensor {name} ends at byte {end}, the file at {len(file.content)}; "
            "get the file again"
        )
    return file.content[info.start : end].reshape(count, layout.bytes)


def _unpack_f32(blocks: np.ndarray) -> Parts:
    return {"weight": _as(blocks, "<f4")}


def _unpack_f16(blocks: np.ndarray) -> Parts:
    return {"weight": _as(blocks, "<f2")}


def _unpack_q4_0(blocks: np.ndarray) -> Parts:
    """(count, 18): a float16 scale d, then 32 codes of 4 bits; value = d * (code - 8)."""
    scales = _as(blocks[:, :2], "<f2")
    return {"weight": _pack_nibbles(blocks[:, 2:]), **_shifted(scales, 8)}


def _unpack_q4_1(blocks: np.ndarray) -> Parts:
    """(count, 20): float16 d and m, then 32 codes of 4 bits; value = d * code + m."""
    return {
        "weight": _pack_nibbles(blocks[:, 4:]),
        "scales": _as(blocks[:, :2], "<f2"),
        "biases": _as(blocks[:, 2:4], "<f2"),
    }


def _unpack_q8_0(blocks: np.ndarray) -> Parts:
    """(count, 34): a float16 scale d, then 32 signed codes of 8 bits; value = d * code."""
    scales = _as(blocks[:, :2], "<f2")
    return {"weight": _as(blocks[:, 2:] ^ 0x80, "<u4"), **_shifted(scales, 128)}


def _shifted(scales: np.ndarray, zero: int) -> Parts:
    """Scales and biases of value = scale * (code - zero); exact, for `zero` is a power of two."""
    with np.errstate(over="ignore", invalid="ignore"):  # found later, as not finite
        return {"scales": scales, "biases": (-zero * scales.astype(np.float32)).astype(np.float16)}


def _pack_nibbles(packed: np.ndarray) -> np.ndarray:
    """(count, 16) -> (count * 4,): GGML's order of 4-bit codes to MLX's.

    Byte i of GGML's holds codes i (low) and i + 16 (high); of MLX's, codes 2i and 2i + 1.
    """
    codes = np.hstack([packed & 15, packed >> 4])
    return _as(codes[:, 0::2] | codes[:, 1::2] << 4, "<u4")


def _as(columns: np.ndarray, dtype: str) -> np.ndarray:
    """(count, bytes) uint8 as one flat array of another type."""
    return np.ascontiguousarray(columns).view(dtype).ravel()


LAYOUTS = {
    "F32": _Layout(1, 4, None, _unpack_f32),
    "F16": _Layout(1, 2, None, _unpack_f16),
    "Q4_0": _Layout(GROUP_SIZE, 18, 4, _unpack_q4_0),
    "Q4_1": _Layout(GROUP_SIZE, 20, 4, _unpack_q4_1),
    "Q8_0": _Layout(GROUP_SIZE, 34, 8, _unpack_q8_0),
}

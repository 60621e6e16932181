"""Tensors of a GGUF file in MLX's layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import GgufFile

GROUP_SIZE = 32  # weights that share a scale; MLX has no smaller groups
CHUNK = 2**14  # blocks unpacked at a time, to keep intermediate arrays small

Parts = dict[str, np.ndarray]


def read_tensor(file: GgufFile, name: str) -> Parts:
    """The contents of one tensor.

    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q3_K are exact, bit for bit. Q4_K, Q5_K and
    Q8_K keep every code; their scales, products of two numbers in the file, are rounded to
    float16. Q2_K and Q6_K have groups of 16 weights, which MLX lacks: their values become 8-bit
    codes in groups of 32, with an error of at most 1/254 of the group's largest value.

    Args:
        file: the file.
        name: a tensor of shape (..., columns) in it.

    Returns:
        `weight` (..., columns) float16 for F16, float32 for F32 and BF16. For the quantised types
        MLX's affine layout, value = scale * code + bias: `weight` (..., columns * bits / 32)
        uint32, the first code in the lowest bits; `scales`, `biases` (..., columns / 32) float16.

    Raises:
        UserError: an unsupported type, a file that ends too early, or values that are not finite.

    Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
    """
    shape = file.tensors[name].shape
    layout = _layout(file, name)
    blocks = _blocks(file, name, layout)
    with np.errstate(all="ignore"):  # overflows and the like show up below as not finite
        chunks = [layout.unpack(blocks[at : at + CHUNK]) for at in range(0, len(blocks), CHUNK)]
    parts = {
        part: np.concatenate([chunk[part] for chunk in chunks]).reshape(*shape[:-1], -1)
        for part in chunks[0]
    }
    for array in parts.values():
        if array.dtype != np.uint32 and not np.isfinite(array).all():
            raise UserError(
                f"{file.path}: tensor {name} holds numbers that are not finite in "
                f"{array.dtype}; get the file again"
            )
    return parts


def check_tensors(file: GgufFile) -> None:
    """Check the table of tensors against the size of the file.

    Raises:
        UserError: a type that `read_tensor` does not support, a tensor beyond the end of the file,
            or two that share bytes: such a file could claim to hold any number of weights.
    """
    spans = []
    for name, info in file.tensors.items():
        layout = _layout(file, name)
        spans.append((info.start, info.start + _blocks(file, name, layout).size, name))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise UserError(
                f"{file.path}: tensors {first} and {second} share bytes; get the file again"
            )


def quantised_bits(file: GgufFile, name: str) -> int | None:
    """Bits per code in MLX's layout of a quantised tensor; None if it holds floats."""
    return _layout(file, name).bits


@dataclass(frozen=True)
class _Layout:
    """How one GGML type is stored.

    Attributes:
        weights, bytes: weights in a block, and its size.
        bits: bits per code in MLX's layout; None for floats.
        unpack: blocks (count, bytes) uint8 -> flat arrays.
    """

    weights: int
    bytes: int
    bits: int | None
    unpack: Callable[[np.ndarray], Parts]


def _layout(file: GgufFile, name: str) -> _Layout:
    kind = file.tensors[name].kind
    if kind not in LAYOUTS:
        raise UserError(
            f"{file.path}: tensor {name} is {kind}, which cannot be imported; use a file that has "
            f"only {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[kind]


def _blocks(file: GgufFile, name: str, layout: _Layout) -> np.ndarray:
    info = file.tensors[name]
    if not info.shape or 0 in info.shape or info.shape[-1] % layout.weights:
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


# ---------------------------------------------------------------------------------------------
# Floats, and blocks of 32 weights


def _unpack_bf16(blocks: np.ndarray) -> Parts:
    """(count, 2): the upper half of a float32."""
    return {"weight": (_as(blocks, "<u2").astype(np.uint32) << 16).view(np.float32)}


def _unpack_q4_0(blocks: np.ndarray) -> Parts:
    """(count, 18): a float16 scale d, then 32 codes of 4 bits; value = d * (code - 8)."""
    return _shifted(_fields(blocks[:, 2:], 4), 4, _halves(blocks[:, :2]), 8)


def _unpack_q4_1(blocks: np.ndarray) -> Parts:
    """(count, 20): float16 d and m, then 32 codes of 4 bits; value = d * code + m."""
    return _affine(_fields(blocks[:, 4:], 4), 4, _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _unpack_q5_0(blocks: np.ndarray) -> Parts:
    """(count, 22): a float16 scale d, then 32 codes of 5 bits; value = d * (code - 16)."""
    return _shifted(_five_bits(blocks[:, 2:]), 5, _halves(blocks[:, :2]), 16)


def _unpack_q5_1(blocks: np.ndarray) -> Parts:
    """(count, 24): float16 d and m, then 32 codes of 5 bits; value = d * code + m."""
    return _affine(_five_bits(blocks[:, 4:]), 5, _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    """(count, 20) -> codes (count, 32): stored as 32 high bits, then 32 times 4 low bits."""
    highest = np.unpackbits(blocks[:, :4], axis=1, bitorder="little")
    return highest << 4 | _fields(blocks[:, 4:], 4)


def _unpack_q8_0(blocks: np.ndarray) -> Parts:
    """(count, 34): a float16 scale d, then 32 signed codes of 8 bits; value = d * code."""
    return _shifted(blocks[:, 2:] ^ 0x80, 8, _halves(blocks[:, :2]), 128)


# ---------------------------------------------------------------------------------------------
# K-quants: blocks of 256 weights, in groups whose scale is a small integer


def _unpack_q2_k(blocks: np.ndarray) -> Parts:
    """(count, 84): 16 bytes for the groups of 16, 256 codes of 2 bits, float16 d and m.

    The low half of a group's byte is its scale, the high half its minimum:
    value = d * scale * code - m * minimum.
    """
    groups = blocks[:, :16]
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    steps = _halves(blocks[:, 80:82]) * (groups & 15)
    lows = _halves(blocks[:, 82:]) * (groups >> 4)
    return _rounded(steps[..., None] * codes - lows[..., None])


def _unpack_q3_k(blocks: np.ndarray) -> Parts:
    """(count, 110): 256 high bits, 256 times 2 low bits, 12 bytes of scales, a float16 d.

    A scale is a 6-bit number minus 32, stored as 16 times 4 low bits, then 16 times 2 high ones.
    value = d * scale * (code - 4), where scale * (code - 4) is between -124 and 128: with d
    negated, it fits an 8-bit code without rounding.
    """
    scales = _fields(blocks[:, 96:104], 4) | _fields(blocks[:, 104:108], 2) << 4
    low = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = (_fields(blocks[:, :32], 1) << 2 | low).reshape(-1, 16, 16)
    multiples = (scales.astype(np.int16) - 32)[..., None] * (codes.astype(np.int16) - 4)
    return _shifted((128 - multiples).astype(np.uint8), 8, -_halves(blocks[:, 108:]), 128)


def _unpack_q4_k(blocks: np.ndarray) -> Parts:
    """(count, 144): float16 d and m, 12 bytes of scales and minima, 256 codes of 4 bits."""
    codes = _fields(blocks[:, 16:].reshape(-1, 4, 32), 4)
    return _affine(codes, 4, *_scales_and_minima(blocks))


def _unpack_q5_k(blocks: np.ndarray) -> Parts:
    """(count, 176): as Q4_K, with 256 high bits in front of 256 times 4 low ones."""
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    return _affine(_fields(blocks[:, 16:48], 1) << 4 | low, 5, *_scales_and_minima(blocks))


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (count, 8) of Q4_K and Q5_K: d * scale, and -m * minimum.

    Scales and minima are 8 numbers of 6 bits each. The first four are the low bits of bytes 0 to 3
    (minima: 4 to 7). The last four have their low 4 bits in the halves of bytes 8 to 11, and their
    2 high bits above the first four.
    """
    packed = blocks[:, 4:16]
    first, last, high = packed[:, :8] & 63, _fields(packed[:, 8:], 4), packed[:, :8] >> 6 << 4
    scales = np.hstack([first[:, :4], last[:, :4] | high[:, :4]])
    minima = np.hstack([first[:, 4:], last[:, 4:] | high[:, 4:]])
    return _halves(blocks[:, :2]) * scales, -_halves(blocks[:, 2:4]) * minima


def _unpack_q6_k(blocks: np.ndarray) -> Parts:
    """(count, 210): 256 times 4 low bits, 256 times 2 high ones, 16 signed scales, a float16 d.

    value = d * scale * (code - 32)
    """
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    codes = (high << 4 | low).reshape(-1, 16, 16).astype(np.float32) - 32
    steps = _halves(blocks[:, 208:]) * _as(blocks[:, 192:208], "i1").reshape(-1, 16)
    return _rounded(steps[..., None] * codes)


def _unpack_q8_k(blocks: np.ndarray) -> Parts:
    """(count, 292): a float32 scale d, 256 signed codes of 8 bits, then sums that are not used."""
    return _shifted(blocks[:, 4:260] ^ 0x80, 8, _as(blocks[:, :4], "<f4")[:, None], 128)


# ---------------------------------------------------------------------------------------------
# Into MLX's layout


def _rounded(values: np.ndarray) -> Parts:
    """Float32 values as signed 8-bit codes in groups of 32 weights."""
    groups = values.reshape(-1, GROUP_SIZE)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    # The next larger float16, so that no code overflows and no scale is 0.
    scales = np.nextafter((largest / 127).astype(np.float16), np.float16(np.inf))
    scales = scales.astype(np.float32)
    return _shifted(np.rint(groups / scales).astype(np.int8).view(np.uint8) ^ 0x80, 8, scales, 128)


def _shifted(codes: np.ndarray, bits: int, scales: np.ndarray, zero: int) -> Parts:
    """value = scale * (code - zero); the bias is exact because `zero` is a power of two."""
    return _affine(codes, bits, scales, -zero * scales.astype(np.float16).astype(np.float32))


def _affine(codes: np.ndarray, bits: int, scales: np.ndarray, biases: np.ndarray) -> Parts:
    """value = scale * code + bias.

    codes           uint8, `bits` of them in use
    scales, biases  (count, groups), or (count, 1) if all groups of a block share them
    """
    groups = codes.size // GROUP_SIZE
    wide = lambda x: np.repeat(x.astype(np.float16).ravel(), groups // x.size)
    return {"weight": _packed(codes, bits), "scales": wide(scales), "biases": wide(biases)}


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as a stream of bits, lowest first, in 32-bit words."""
    if bits == 8:
        return _as(codes, "<u4")
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little").view("<u4")


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """(..., bytes) -> (..., bytes * 8 / bits): the lowest field of each byte, then the next ..."""
    fields = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.concatenate(fields, axis=-1)


def _halves(columns: np.ndarray) -> np.ndarray:
    """(count, 2) bytes -> (count, 1) float32."""
    return _as(columns, "<f2").astype(np.float32)[:, None]


def _as(columns: np.ndarray, dtype: str) -> np.ndarray:
    """(count, bytes) uint8 -> one flat array of another type."""
    return np.ascontiguousarray(columns).view(dtype).ravel()


LAYOUTS = {
    "F32": _Layout(1, 4, None, lambda blocks: {"weight": _as(blocks, "<f4")}),
    "F16": _Layout(1, 2, None, lambda blocks: {"weight": _as(blocks, "<f2")}),
    "BF16": _Layout(1, 2, None, _unpack_bf16),
    "Q4_0": _Layout(32, 18, 4, _unpack_q4_0),
    "Q4_1": _Layout(32, 20, 4, _unpack_q4_1),
    "Q5_0": _Layout(32, 22, 5, _unpack_q5_0),
    "Q5_1": _Layout(32, 24, 5, _unpack_q5_1),
    "Q8_0": _Layout(32, 34, 8, _unpack_q8_0),
    "Q2_K": _Layout(256, 84, 8, _unpack_q2_k),
    "Q3_K": _Layout(256, 110, 8, _unpack_q3_k),
    "Q4_K": _Layout(256, 144, 4, _unpack_q4_k),
    "Q5_K": _Layout(256, 176, 5, _unpack_q5_k),
    "Q6_K": _Layout(256, 210, 8, _unpack_q6_k),
    "Q8_K": _Layout(256, 292, 8, _unpack_q8_k),
}

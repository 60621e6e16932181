"""A GGUF writer for tests, the block formats in NumPy, and a tiny Llama made with them.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and src/ggml-common.h
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers

from redrafter_mlx.gguf.importer import import_gguf

# ---------------------------------------------------------------------------------------------
# Floats, and blocks of 32 weights that are made of real ones


@dataclass(frozen=True)
class Encoding:
    """A tensor type: its GGML number, float32 weights to bytes, and bytes to a flat float32."""

    name: str
    code: int
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes], np.ndarray]


def encode_q4_0(weights: np.ndarray) -> bytes:
    blocks = weights.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype(np.float16)
    codes = np.clip(np.round(blocks / scale) + 8, 0, 15).astype(np.uint8)
    return np.hstack([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4]).tobytes()


def decode_q4_0(data: bytes) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 18)
    codes = np.hstack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4])
    return ((codes.astype(np.float32) - 8) * half(blocks[:, 0:2])).ravel()


def encode_q4_1(weights: np.ndarray) -> bytes:
    blocks = weights.reshape(-1, 32)
    low = blocks.min(axis=1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(axis=1, keepdims=True) - low) / 15).astype(np.float16)
    codes = np.clip(np.round((blocks - low) / scale), 0, 15).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.hstack([scale.view(np.uint8), low.view(np.uint8), packed]).tobytes()


def decode_q4_1(data: bytes) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 20)
    codes = np.hstack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4])
    return (codes * half(blocks[:, 0:2]) + half(blocks[:, 2:4])).ravel()


def encode_q8_0(weights: np.ndarray) -> bytes:
    blocks = weights.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.round(blocks / scale), -128, 127).astype(np.int8)
    return np.hstack([scale.view(np.uint8), codes.view(np.uint8)]).tobytes()


def decode_q8_0(data: bytes) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 34)
    return (np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * half(blocks[:, 0:2])).ravel()


def half(columns: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def floats(name: str, code: int, dtype: type) -> Encoding:
    return Encoding(
        name,
        code,
        lambda weights: weights.astype(dtype).tobytes(),
        lambda data: np.frombuffer(data, dtype).astype(np.float32),
    )


def encode_bf16(weights: np.ndarray) -> bytes:
    """Cut off, not rounded."""
    return (weights.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def decode_bf16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


F32 = floats("F32", 0, np.float32)
F16 = floats("F16", 1, np.float16)
BF16 = Encoding("BF16", 30, encode_bf16, decode_bf16)
Q4_0 = Encoding("Q4_0", 2, encode_q4_0, decode_q4_0)
Q4_1 = Encoding("Q4_1", 3, encode_q4_1, decode_q4_1)
Q8_0 = Encoding("Q8_0", 8, encode_q8_0, decode_q8_0)
ENCODINGS = [F32, F16, Q4_0, Q4_1, Q8_0]

# ---------------------------------------------------------------------------------------------
# Blocks of random bits, read weight by weight: what ggml's dequantize_row_... make of a block


@dataclass(frozen=True)
class BlockType:
    """A type by one weight: `value(block, i)` is what weight i of a block of bytes is worth.

    `halves` and `singles` say at which bytes of a block float16 and float32 numbers stand.
    """

    name: str
    code: int
    weights: int
    bytes: int
    value: Callable[[bytes, int], float]
    halves: tuple[int, ...] = (0,)
    singles: tuple[int, ...] = ()

    def blocks(self, count: int, seed: int = 0) -> bytes:
        """Random blocks whose float numbers are small, of both signs, some of them subnormal."""
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (count, self.bytes), dtype=np.uint8)
        for places, dtype in ((self.halves, np.float16), (self.singles, np.float32)):
            for at in places:
                numbers = (rng.normal(0, 1e-3, count) * 10.0 ** -rng.integers(0, 5, count)).astype(
                    dtype
                )
                size = numbers.itemsize
                blocks[:, at : at + size] = numbers.view(np.uint8).reshape(count, size)
        return blocks.tobytes()

    def decode(self, data: bytes) -> np.ndarray:
        """A flat float64 array."""
        starts = range(0, len(data), self.bytes)
        blocks = [data[start : start + self.bytes] for start in starts]
        return np.array([self.value(block, i) for block in blocks for i in range(self.weights)])

    @property
    def encoding(self) -> Encoding:
        """As the type of a tensor whose weights are of no account, only their number."""
        encode = lambda weights: self.blocks(weights.size // self.weights)
        return Encoding(self.name, self.code, encode, self.decode)


def float_at(block: bytes, at: int, code: str = "e") -> float:
    return struct.unpack_from(f"<{code}", block, at)[0]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibble(packed: bytes, i: int) -> int:
    """Code i of a block of 32: the low halves of 16 bytes, then the high ones."""
    return packed[i % 16] >> 4 * (i // 16) & 15


def nibble_of_64(packed: bytes, i: int) -> int:
    """Code i of a block of 256: 64 codes in 32 bytes, first the low halves."""
    return packed[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15


def crumb(packed: bytes, i: int) -> int:
    """Two bits of weight i of 256: 128 weights in 32 bytes, the lowest bits first."""
    return packed[i // 128 * 32 + i % 32] >> 2 * (i // 32 % 4) & 3


def bit(packed: bytes, i: int) -> int:
    """One bit of weight i of 256: bit 0 of 32 bytes, then bit 1 ..."""
    return packed[i % 32] >> i // 32 & 1


def q5_code(block: bytes, at: int, i: int) -> int:
    """The fifth bit is bit i of a 32-bit number, the others follow it."""
    return struct.unpack_from("<I", block, at)[0] >> i << 4 & 16 | nibble(block[at + 4 :], i)


def six_bits(packed: bytes, group: int) -> tuple[int, int]:
    """Scale and minimum of one of the 8 groups in Q4_K and Q5_K."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    low = packed[group + 4]
    return low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4


def q2_k(block: bytes, i: int) -> float:
    scale, code = block[i // 16], crumb(block[16:], i)
    return float_at(block, 80) * (scale & 15) * code - float_at(block, 82) * (scale >> 4)


def q3_k(block: bytes, i: int) -> float:
    packed, group = block[96:108], i // 16
    low = packed[group % 8] >> 4 * (group // 8) & 15
    scale = (low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
    code = crumb(block[32:], i) - (0 if bit(block, i) else 4)
    return float_at(block, 108) * scale * code


def q4_k(block: bytes, i: int) -> float:
    scale, minimum = six_bits(block[4:], i // 32)
    code = nibble_of_64(block[16:], i)
    return float_at(block, 0) * scale * code - float_at(block, 2) * minimum


def q5_k(block: bytes, i: int) -> float:
    scale, minimum = six_bits(block[4:], i // 32)
    code = bit(block[16:], i) << 4 | nibble_of_64(block[48:], i)
    return float_at(block, 0) * scale * code - float_at(block, 2) * minimum


def q6_k(block: bytes, i: int) -> float:
    half, place = divmod(i, 128)
    low = block[half * 64 + place % 64] >> 4 * (place // 64) & 15
    code = low | crumb(block[128:], i) << 4
    return float_at(block, 208) * signed(block[192 + i // 16]) * (code - 32)


BLOCK_TYPES = [
    BlockType("Q4_0", 2, 32, 18, lambda b, i: float_at(b, 0) * (nibble(b[2:], i) - 8)),
    BlockType(
        *("Q4_1", 3, 32, 20, lambda b, i: float_at(b, 0) * nibble(b[4:], i) + float_at(b, 2)),
        halves=(0, 2),
    ),
    BlockType("Q5_0", 6, 32, 22, lambda b, i: float_at(b, 0) * (q5_code(b, 2, i) - 16)),
    BlockType(
        *("Q5_1", 7, 32, 24, lambda b, i: float_at(b, 0) * q5_code(b, 4, i) + float_at(b, 2)),
        halves=(0, 2),
    ),
    BlockType("Q8_0", 8, 32, 34, lambda b, i: float_at(b, 0) * signed(b[2 + i])),
    BlockType("Q2_K", 10, 256, 84, q2_k, halves=(80, 82)),
    BlockType("Q3_K", 11, 256, 110, q3_k, halves=(108,)),
    BlockType("Q4_K", 12, 256, 144, q4_k, halves=(0, 2)),
    BlockType("Q5_K", 13, 256, 176, q5_k, halves=(0, 2)),
    BlockType("Q6_K", 14, 256, 210, q6_k, halves=(208,)),
    BlockType(
        *("Q8_K", 15, 256, 292, lambda b, i: float_at(b, 0, "f") * signed(b[4 + i])),
        halves=(),
        singles=(0,),
    ),
]


def foreign(code: int) -> Encoding:
    """A type that is not imported, by its GGML number; 256 bytes stand for the contents."""
    return Encoding(f"type {code}", code, lambda weights: bytes(256), lambda data: np.zeros(0))


# ---------------------------------------------------------------------------------------------
# Files: mx.save_gguf cannot write quantised tensors


@dataclass
class Gguf:
    """The contents of a GGUF file: `tensors` maps a name to (encoding, float32 weights)."""

    metadata: dict = field(default_factory=dict)
    tensors: dict[str, tuple[Encoding, np.ndarray]] = field(default_factory=dict)
    version: int = 3

    def write(self, path: Path) -> Path:
        infos, data = b"", b""
        for name, (encoding, weights) in self.tensors.items():
            shape = weights.shape[::-1]
            infos += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            infos += struct.pack("<IQ", encoding.code, len(data))
            data += _padded(encoding.encode(weights))
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))
        for key, value in self.metadata.items():
            head += _string(key) + _value(value)
        path.write_bytes(_padded(head + infos) + data)
        return path

    def decoded(self) -> dict[str, np.ndarray]:
        """What the tensors are worth after a round trip through their encodings."""
        return {
            name: encoding.decode(encoding.encode(weights)).reshape(weights.shape)
            for name, (encoding, weights) in self.tensors.items()
        }


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value[0], float):
        return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


# ---------------------------------------------------------------------------------------------
# A tiny Llama

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, HEAD_DIM = 64, 4, 2, 96, 2, 16

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PARTS = ["he", "ll", "hell", "12", "e!"]
TOKENS = [*SPECIAL, "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *PARTS]
TYPES = [3, 3, 3, 4] + [1] * (len(TOKENS) - 4)


def tiny_metadata(**changes: object) -> dict:
    """Metadata of the tiny model; __ in a keyword stands for a dot, None removes the key."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "1 2", "e !"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def tiny_tensors(
    encoding: Encoding = Q4_1, vocabulary: int = len(TOKENS)
) -> dict[str, tuple[Encoding, np.ndarray]]:
    """Matrices in one encoding, norms in F32 with values that float16 holds exactly."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> tuple[Encoding, np.ndarray]:
        return encoding, rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def norm() -> tuple[Encoding, np.ndarray]:
        return F32, rng.integers(1, 9, HIDDEN).astype(np.float32) / 4

    tensors = {"token_embd.weight": matrix(vocabulary, HIDDEN), "output_norm.weight": norm()}
    for layer in range(LAYERS):
        for name, rows, columns in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HEAD_DIM * KV_HEADS, HIDDEN),
            ("attn_v", HEAD_DIM * KV_HEADS, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ]:
            tensors[f"blk.{layer}.{name}.weight"] = matrix(rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = norm()
    return tensors


def tiny(encoding: Encoding = Q4_1, **changes: object) -> Gguf:
    return Gguf(tiny_metadata(**changes), tiny_tensors(encoding))


def imported(tmp_path: Path, gguf: Gguf) -> Path:
    """The directory that the import makes of a file."""
    destination = tmp_path / "model"
    destination.mkdir()
    import_gguf(gguf.write(tmp_path / "tiny.gguf"), destination)
    return destination

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
# Blocks of 32 weights


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


F32 = floats("F32", 0, np.float32)
F16 = floats("F16", 1, np.float16)
Q4_0 = Encoding("Q4_0", 2, encode_q4_0, decode_q4_0)
Q4_1 = Encoding("Q4_1", 3, encode_q4_1, decode_q4_1)
Q8_0 = Encoding("Q8_0", 8, encode_q8_0, decode_q8_0)
ENCODINGS = [F32, F16, Q4_0, Q4_1, Q8_0]


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

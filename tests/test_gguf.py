"""The GGUF import: weights, configuration and tokenizer against independent arithmetic."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import regex
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf import import_gguf

HIDDEN, HEADS, KV_HEADS, FFN = 64, 4, 2, 96

# ---------------------------------------------------------------------------------------------
# A small GGUF writer: mx.save_gguf cannot write quantised tensors.


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
    return codes * half(blocks[:, 0:2]) + half(blocks[:, 2:4])


def encode_q8_0(weights: np.ndarray) -> bytes:
    blocks = weights.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.round(blocks / scale), -128, 127).astype(np.int8)
    return np.hstack([scale.view(np.uint8), codes.view(np.uint8)]).tobytes()


def decode_q8_0(data: bytes) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 34)
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * half(blocks[:, 0:2])


def half(columns: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Encoding:
    """A GGUF tensor type: its GGML number and how float32 weights become bytes."""

    code: int
    encode: Callable[[np.ndarray], bytes]


F32 = Encoding(0, lambda weights: weights.astype(np.float32).tobytes())
F16 = Encoding(1, lambda weights: weights.astype(np.float16).tobytes())
Q4_1 = Encoding(3, encode_q4_1)
Q8_0 = Encoding(8, encode_q8_0)


@dataclass
class Gguf:
    """The contents of a GGUF file: `tensors` maps a name to (encoding, float32 weights)."""

    metadata: dict = field(default_factory=dict)
    tensors: dict[str, tuple[Encoding, np.ndarray]] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        infos, data = b"", b""
        for name, (encoding, weights) in self.tensors.items():
            shape = weights.shape[::-1]
            infos += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            infos += struct.pack("<IQ", encoding.code, len(data))
            data += _padded(encoding.encode(weights))
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        for key, value in self.metadata.items():
            head += _string(key) + _value(value)
        path.write_bytes(_padded(head + infos) + data)
        return path


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


# ---------------------------------------------------------------------------------------------
# A tiny Llama as GGUF.

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PARTS = ["he", "ll", "hell", "12", "e!"]
TOKENS = [*SPECIAL, "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *PARTS]
TYPES = [3, 3, 3, 4] + [1] * (len(TOKENS) - 4)


def tiny_metadata() -> dict:
    return {
        "general.architecture": "llama",
        "general.file_type": 3,
        "llama.block_count": 2,
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


def tiny_tensors(encoding: Encoding = Q4_1) -> dict[str, tuple[Encoding, np.ndarray]]:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    tensors = {
        "token_embd.weight": (Q8_0 if encoding == Q4_1 else encoding, matrix(len(TOKENS), HIDDEN)),
        "output_norm.weight": (F32, np.ones(HIDDEN, np.float32)),
    }
    kv_size = HIDDEN // HEADS * KV_HEADS
    for layer in range(2):
        for name, rows, columns in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv_size, HIDDEN),
            ("attn_v", kv_size, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ]:
            tensors[f"blk.{layer}.{name}.weight"] = (encoding, matrix(rows, columns))
        for name in ("attn_norm", "ffn_norm"):
            norm = rng.integers(1, 9, HIDDEN).astype(np.float32) / 4
            tensors[f"blk.{layer}.{name}.weight"] = (F32, norm)
    return tensors


def imported(tmp_path: Path, gguf: Gguf) -> Path:
    destination = tmp_path / "model"
    destination.mkdir()
    import_gguf(gguf.write(tmp_path / "tiny.gguf"), destination)
    return destination


# ---------------------------------------------------------------------------------------------
# Weights


def test_dequantised_weights_are_the_blocks_arithmetic(tmp_path):
    tensors = tiny_tensors()
    weights = mx.load(str(imported(tmp_path, Gguf(tiny_metadata(), tensors)) / "model.safetensors"))
    for theirs, ours, bits, decode in [
        ("token_embd", "model.embed_tokens", 8, decode_q8_0),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", 4, decode_q4_1),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 4, decode_q4_1),
    ]:
        encoding, original = tensors[f"{theirs}.weight"]
        expected = decode(encoding.encode(original)).reshape(original.shape)
        scales, biases = (weights[f"{ours}.{part}"] for part in ("scales", "biases"))
        actual = mx.dequantize(
            weights[f"{ours}.weight"],
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=32,
            bits=bits,
        )
        error = float(np.abs(np.array(actual) - expected).max())
        print(f"{theirs}: max |difference| = {error:.2e}")
        assert error <= 1e-7
        assert np.abs(expected - original).max() < 0.1  # the blocks hold the matrix at all


def test_quantisation_is_declared_per_module(tmp_path):
    config = json.loads(
        (imported(tmp_path, Gguf(tiny_metadata(), tiny_tensors())) / "config.json").read_text()
    )
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }


def test_a_quantised_model_holds_16_bit_floats_only(tmp_path):
    model, _ = mlx_lm.load(str(imported(tmp_path, Gguf(tiny_metadata(), tiny_tensors()))))
    dtypes = {str(array.dtype) for _, array in tree_flatten(model.parameters())}
    assert dtypes == {"mlx.core.uint32", "mlx.core.float16"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp's converter stores q and k of a Hugging Face Llama."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_the_same_hugging_face_model(tmp_path, tied):
    """Row order, RoPE, norms and heads: an ordinary Llama against its GGUF copy."""
    stored = tiny_tensors(F32)
    if not tied:
        stored["output.weight"] = (F32, stored["token_embd.weight"][1][::-1].copy())
    original = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            intermediate_size=FFN,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            vocab_size=len(TOKENS),
            rope_theta=500.0,
            tie_word_embeddings=tied,
        )
    )
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {}
    for parameter, _ in tree_flatten(original.parameters()):
        name = parameter.replace("model.layers", "blk")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[parameter] = mx.array(stored[name][1])
    original.load_weights(list(weights.items()))
    permuted = {
        name: (encoding, interleaved(weight, HEADS if "attn_q" in name else KV_HEADS))
        if "attn_q" in name or "attn_k" in name
        else (encoding, weight)
        for name, (encoding, weight) in stored.items()
    }
    gguf = Gguf(tiny_metadata() | {"general.file_type": 0}, permuted)
    copy, _ = mlx_lm.load(str(imported(tmp_path, gguf)))
    prompt = mx.array([[5, 60, 61, 200, 7, 7, 90]])
    error = float(mx.abs(copy(prompt) - original(prompt)).max())
    print(f"max |difference of logits| = {error:.2e}")
    assert error < 1e-4


# ---------------------------------------------------------------------------------------------
# Files that cannot be imported


def changed(**changes: object) -> Gguf:
    """The tiny file with some metadata replaced (None removes); __ stands for a dot."""
    metadata = tiny_metadata()
    for key, value in changes.items():
        metadata[key.replace("__", ".")] = value
    return Gguf({k: v for k, v in metadata.items() if v is not None}, tiny_tensors())


def with_tensor(name: str, encoding: Encoding, shape: tuple[int, ...]) -> Gguf:
    return Gguf(tiny_metadata(), tiny_tensors() | {name: (encoding, np.ones(shape, np.float32))})


@pytest.mark.parametrize(
    ("gguf", "named"),
    [
        (changed(general__architecture="qwen2"), "'qwen2'"),
        (changed(general__architecture=None), "general.architecture"),
        (changed(general__file_type=15), "file_type 15"),
        (changed(llama__block_count=None), "llama.block_count"),
        (changed(llama__rope__scaling__type="yarn"), "'yarn'"),
        (changed(llama__rope__dimension_count=8), "8 of 16"),
        (changed(tokenizer__ggml__model="llama"), "'llama' tokenizer"),
        (changed(tokenizer__ggml__pre="qwen2"), "'qwen2'"),
        (changed(tokenizer__ggml__eos_token_id=9999), "9999"),
        (changed(tokenizer__ggml__token_type=TYPES[:-1]), f"{len(TYPES) - 1} token types"),
        (changed(tokenizer__ggml__merges=["h e", "hell o"]), "merges"),
        (with_tensor("output.weight", F16, (len(TOKENS), HIDDEN)), "tensor output.weight"),
        (with_tensor("rope_freqs.weight", F32, (8,)), "rope_freqs.weight"),
        (with_tensor("blk.0.ffn_gate_exps.weight", F32, (8,)), "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_an_unsupported_file_is_refused_by_name(tmp_path, gguf, named):
    with pytest.raises(UserError) as caught:
        imported(tmp_path, gguf)
    message = str(caught.value)
    assert named in message
    assert "tiny.gguf" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 3, 20, 500, -1000])
def test_a_truncated_file_is_refused(tmp_path, size):
    source = Gguf(tiny_metadata(), tiny_tensors()).write(tmp_path / "cut.gguf")
    source.write_bytes(source.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        import_gguf(source, tmp_path)


# ---------------------------------------------------------------------------------------------
# Tokenizer

CHATML_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# Ids from the merges in the demo's GGUF file, applied by hand-written code.
KNOWN_IDS = [
    ("", []),
    ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30]),
    ("In 2024, 12 users", [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 3629]),
    ("naïve café — Ærøskøbing", [3546, 46494, 37366, 1841, 44741, 98, 21817, 5746, 21817, 7519]),
    ("日本語", [23274, 115, 40993, 179, 120, 248]),
    ("🙂 emoji", [10813, 38887, 649, 33777]),
    (
        "def f(x):\n    return x ** 2\n",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
    ),
    ("  leading and   runs \t\n\n of ", [216, 2899, 284, 256, 7313, 216, 197, 1116, 282, 216]),
    ("it's we'll I'd", [269, 506, 392, 3060, 339, 6737]),
    ("١٢ ½ Ⅷ ²", [164, 111, 164, 112, 216, 16738, 216, 173, 223, 117, 216, 19133]),
    ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
]


@pytest.fixture(scope="module")
def demo_tokenizer(demo_path):
    return AutoTokenizer.from_pretrained(demo_path)


@pytest.mark.parametrize(("text", "ids"), KNOWN_IDS)
def test_known_ids_and_back(demo_tokenizer, text, ids):
    assert demo_tokenizer.encode(text) == ids
    assert demo_tokenizer.decode(ids) == text


class ReferenceBpe:
    """Byte-level BPE by the book: split, then merge the pair of the lowest rank until none is."""

    WORDS = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, directory: Path):
        model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        self.ids = model["vocab"]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        moved = [byte for byte in range(256) if byte not in kept]
        self.letters = {byte: chr(byte) for byte in kept}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(moved)}

    def encode(self, text: str) -> list[int]:
        pieces = regex.split(r"(\p{N})", text)
        words = [word for piece in pieces for word in self.WORDS.findall(piece)]
        return [self.ids[part] for word in words for part in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(
                range(len(parts) - 1),
                key=lambda i: self.ranks.get((parts[i], parts[i + 1]), len(self.ranks)),
            )
            if (parts[best], parts[best + 1]) not in self.ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts


def test_random_text_agrees_with_a_reference_bpe(demo_path):
    reference = ReferenceBpe(demo_path)
    tokenizer = Tokenizer.from_file(str(demo_path / "tokenizer.json"))
    rng = random.Random(0)
    alphabets = [
        "abc XYZ \n\t'",
        "0189 ٣½²Ⅷ",
        "éüñßĳΩжЖ",
        "日本한글ไทย",
        "🙂🇫🇷👩",
        '(){}[];=+-*/\\"#_<|>',
    ]
    for _ in range(3000):
        text = "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(0, 40)))
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens(demo_tokenizer):
    assert demo_tokenizer.eos_token == "<|im_end|>"
    assert demo_tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert len(demo_tokenizer) == 49152


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([{"role": "user", "content": "Hi"}], CHATML_SYSTEM),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "Be brief.",
        ),
    ],
)
def test_chat_template(demo_tokenizer, messages, system):
    text = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_file_without_chat_template_gets_none(tmp_path):
    destination = imported(tmp_path, Gguf(tiny_metadata(), tiny_tensors()))
    assert AutoTokenizer.from_pretrained(destination).chat_template is None


def test_digits_and_words_are_split_before_the_merges(tmp_path):
    destination = imported(tmp_path, Gguf(tiny_metadata(), tiny_tensors()))
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.tokenize("hell12 ٣٣") == ["hell", "1", "2", "Ġ", "Ù", "£", "Ù", "£"]
    assert tokenizer.tokenize("e! he") == ["e", "!", "Ġ", "he"]


def test_control_and_user_defined_tokens_are_never_split(tmp_path):
    destination = imported(tmp_path, Gguf(tiny_metadata(), tiny_tensors()))
    tokenizer = AutoTokenizer.from_pretrained(destination)
    ids = tokenizer.encode("hell<think><|im_end|>")
    assert ids == [TOKENS.index("hell"), TOKENS.index("<think>"), TOKENS.index("<|im_end|>")]
    # Only control tokens are special: text the user defined is text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hell<think>"

"""The GGUF import as a whole: models against a second implementation, and files refused."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from gguf_writer import (
    BF16,
    ENCODINGS,
    F16,
    F32,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    Q4_0,
    Q4_1,
    Q8_0,
    TOKENS,
    Encoding,
    Gguf,
    foreign,
    imported,
    tiny,
    tiny_metadata,
    tiny_tensors,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import import_gguf
from redrafter_mlx.loading import hub

PROMPT = [5, 60, 61, 200, 7, 7, 90, 0, 17]

# ---------------------------------------------------------------------------------------------
# Logits


class ReferenceLlama:
    """A Llama in NumPy and float64, on tensors as GGUF names, orders and permutes them."""

    def __init__(self, tensors: dict[str, np.ndarray], base: float = 500.0, eps: float = 1e-5):
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.base, self.eps = base, eps

    def logits(self, ids: list[int]) -> np.ndarray:
        """(ids, vocabulary)"""
        x = self.tensors["token_embd.weight"][ids]
        for layer in range(LAYERS):
            x = x + self.attention(f"blk.{layer}", self.norm(f"blk.{layer}.attn_norm", x))
            x = x + self.mlp(f"blk.{layer}", self.norm(f"blk.{layer}.ffn_norm", x))
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(head, self.norm("output_norm", x))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.eps) * self.tensors[f"{name}.weight"]

    def attention(self, block: str, x: np.ndarray) -> np.ndarray:
        q, k, v = (
            self.linear(f"{block}.attn_{name}", x).reshape(len(x), -1, HEAD_DIM) for name in "qkv"
        )
        q, k = self.rotated(q), self.rotated(k)
        out = np.empty_like(q)
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            for row in range(len(x)):
                scores = k[: row + 1, shared] @ q[row, head] / np.sqrt(HEAD_DIM)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ v[: row + 1, shared]
        return self.linear(f"{block}.attn_output", out.reshape(len(x), -1))

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """(rows, heads, head_dim): neighbouring numbers are the parts of a complex number."""
        frequencies = self.base ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        turn = np.exp(1j * np.outer(np.arange(len(x)), frequencies))[:, None]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def mlp(self, block: str, x: np.ndarray) -> np.ndarray:
        gate = self.linear(f"{block}.ffn_gate", x)
        return self.linear(
            f"{block}.ffn_down", gate / (1 + np.exp(-gate)) * self.linear(f"{block}.ffn_up", x)
        )


def with_head(gguf: Gguf, encoding: Encoding) -> Gguf:
    """The same file with an output matrix of its own."""
    embedding = gguf.tensors["token_embd.weight"][1]
    head = {"output.weight": (encoding, embedding[::-1].copy())}
    return Gguf(gguf.metadata, gguf.tensors | head)


def mixed() -> Gguf:
    """Every encoding in one file."""
    gguf = with_head(tiny(Q4_0), F16)
    for name, (encoding, weights) in gguf.tensors.items():
        part = name.split(".")[-2]
        chosen = {"token_embd": Q8_0, "attn_v": Q4_1, "ffn_down": Q8_0, "attn_k": F16}
        gguf.tensors[name] = (chosen.get(part, encoding), weights)
    return gguf


def biased(*parts: str) -> Gguf:
    gguf = tiny(Q8_0)
    rng = np.random.default_rng(1)
    for layer in range(LAYERS):
        for part in parts:
            rows = gguf.tensors[f"blk.{layer}.{part}.weight"][1].shape[0]
            bias = rng.integers(-8, 9, rows).astype(np.float32) / 8
            gguf.tensors[f"blk.{layer}.{part}.bias"] = (F32, bias)
    return gguf


MODELS = {
    **{f"{encoding.name}, tied": tiny(encoding) for encoding in [*ENCODINGS, BF16]},
    **{f"{e.name}, untied": with_head(tiny(e), e) for e in ENCODINGS},
    "mixed": mixed(),
    "biases of queries, keys and values": biased("attn_q", "attn_k", "attn_v"),
    "all biases": biased(
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_a_second_implementation(tmp_path, name):
    gguf = MODELS[name]
    model, _ = hub.load(str(imported(tmp_path, gguf)))
    actual = np.array(model(mx.array([PROMPT])).astype(mx.float32))[0]
    expected = ReferenceLlama(gguf.decoded()).logits(PROMPT)
    error = np.abs(actual - expected).max()
    print(f"{name}: max |difference of logits| = {error:.1e} of {np.abs(expected).max():.0f}")
    assert error < (1e-4 if mx.default_device() == mx.cpu else 0.2)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp's converter stores q and k of a Hugging Face Llama."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


HUGGING_FACE = {
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


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_the_same_hugging_face_model(tmp_path, tied):
    """Row order, RoPE, norms and heads: an ordinary Llama against its GGUF copy."""
    gguf = tiny(F32) if tied else with_head(tiny(F32), F32)
    original = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            intermediate_size=FFN,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            vocab_size=len(TOKENS),
            rope_theta=500.0,
            tie_word_embeddings=tied,
        )
    )
    weights = {}
    for parameter, _ in tree_flatten(original.parameters()):
        name = parameter.replace("model.layers", "blk")
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        weights[parameter] = mx.array(gguf.tensors[name][1])
    original.load_weights(list(weights.items()))
    for name, (encoding, weight) in gguf.tensors.items():
        if "attn_q" in name or "attn_k" in name:
            heads = HEADS if "attn_q" in name else KV_HEADS
            gguf.tensors[name] = (encoding, interleaved(weight, heads))
    copy, _ = mlx_lm.load(str(imported(tmp_path, gguf)))
    prompt = mx.array([PROMPT])
    error = float(mx.abs(copy(prompt) - original(prompt)).max())
    print(f"max |difference of logits| = {error:.2e}")
    assert error < 1e-4


# ---------------------------------------------------------------------------------------------
# What is written


def test_quantisation_is_declared_per_module(tmp_path):
    config = json.loads((imported(tmp_path, mixed()) / "config.json").read_text())
    eight = {"group_size": 32, "bits": 8}
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": eight,
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
    }


def test_the_commonest_width_is_the_default(tmp_path):
    config = json.loads((imported(tmp_path, tiny(Q8_0)) / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8}


@pytest.mark.parametrize(
    ("gguf", "dtypes"),
    [
        (tiny(Q4_1), {"uint32", "float16"}),
        (mixed(), {"uint32", "float16"}),
        (tiny(F16), {"float16"}),
        (tiny(F32), {"float32"}),
        (tiny(BF16), {"bfloat16"}),
        (with_head(tiny(BF16), F16), {"float16"}),
    ],
    ids=["Q4_1", "mixed", "F16", "F32", "BF16", "BF16 and F16"],
)
def test_a_model_computes_in_one_type(tmp_path, gguf, dtypes):
    model, _ = mlx_lm.load(str(imported(tmp_path, gguf)))
    found = {str(array.dtype) for _, array in tree_flatten(model.parameters())}
    assert found == {f"mlx.core.{dtype}" for dtype in dtypes}


def test_llama3_scaling_reaches_the_model(tmp_path):
    gguf = tiny(F32, llama__rope__freq_base=500000.0)
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    gguf.tensors["rope_freqs.weight"] = (F32, factors.astype(np.float32))
    model, _ = hub.load(str(imported(tmp_path, gguf)))
    assert np.allclose(model.layers[0].self_attn.rope._freqs * 2 * np.pi, wavelengths * factors)


# ---------------------------------------------------------------------------------------------
# Files that cannot be imported


def with_tensor(name: str, encoding: Encoding, shape: tuple[int, ...]) -> Gguf:
    return Gguf(tiny_metadata(), tiny_tensors() | {name: (encoding, np.ones(shape, np.float32))})


def without(name: str) -> Gguf:
    gguf = tiny()
    del gguf.tensors[name]
    return gguf


@pytest.mark.parametrize(
    ("gguf", "named"),
    [
        (tiny(general__architecture="mamba"), "'mamba'"),
        (tiny(tokenizer__ggml__pre="unheard-of"), "'unheard-of'"),
        (tiny(tokenizer__ggml__eos_token_id=9999), "9999"),
        (tiny(llama__block_count=3), "tensor blk.2.attn_norm.weight is missing"),
        (tiny(llama__block_count=10**9), "tensor blk.2.attn_norm.weight is missing"),
        (tiny(llama__block_count=1), "tensor blk.1."),
        (tiny(llama__feed_forward_length=64), "ffn_gate.weight has shape (96, 64)"),
        (tiny(llama__attention__head_count_kv=4), "attn_k.weight has shape (32, 64)"),
        (tiny(llama__embedding_length=128), "token_embd.weight has shape"),
        (without("token_embd.weight"), "token_embd.weight is missing"),
        (without("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (with_tensor("output.weight", F16, (7, HIDDEN)), "output.weight has shape (7, 64)"),
        (with_tensor("output.weight", foreign(20), (len(TOKENS), HIDDEN)), "weight is IQ4_NL"),
        (
            with_tensor("blk.0.attn_q.weight", foreign(16), (HIDDEN, HIDDEN)),
            "attn_q.weight is IQ2_XXS",
        ),
        (with_tensor("token_embd.weight", foreign(99), (len(TOKENS), HIDDEN)), "weight is type 99"),
        (
            with_tensor("output_norm.weight", Q8_0, (HIDDEN,)),
            "output_norm.weight is a vector in Q8",
        ),
        (with_tensor("rope_freqs.weight", F32, (7,)), "rope_freqs.weight"),
        (with_tensor("rope_factors_long.weight", F32, (8,)), "rope_factors_long.weight"),
        (with_tensor("blk.0.ffn_gate_exps.weight", F32, (8,)), "blk.0.ffn_gate_exps.weight"),
        (with_tensor("blk.0.attn_norm.bias", F32, (HIDDEN,)), "blk.0.attn_norm.bias"),
        (with_tensor("blk.0.attn_q.bias", F32, (3,)), "blk.0.attn_q.bias has shape (3,)"),
        (with_tensor("blk.0.attn_q.scales", F32, (3,)), "blk.0.attn_q.scales"),
    ],
)
def test_an_unsupported_file_is_refused_by_name(tmp_path, gguf, named):
    with pytest.raises(UserError) as caught:
        imported(tmp_path, gguf)
    message = str(caught.value)
    assert named in message
    assert "tiny.gguf" in message
    assert "\n" not in message
    assert not any((tmp_path / "model").iterdir())


def test_a_norm_too_large_for_float16_is_refused(tmp_path):
    gguf = tiny(Q4_1)
    gguf.tensors["output_norm.weight"] = (F32, np.full(HIDDEN, 1e6, np.float32))
    with pytest.raises(UserError, match="output_norm holds 1e\\+06, too large for float16"):
        imported(tmp_path, gguf)


@pytest.mark.parametrize("size", [0, 3, 20, 500, -1000])
def test_a_truncated_file_is_refused(tmp_path, size):
    source = tiny().write(tmp_path / "cut.gguf")
    source.write_bytes(source.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        import_gguf(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]

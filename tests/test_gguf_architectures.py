"""Architectures of GGUF files: mlx-lm's own model against the import of its copy in GGUF.

How the copy is named and laid out is that of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from math import log, sqrt
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gguf_writer import BF16, BLOCK_TYPES, F16, F32, TOKENS, Encoding, Gguf, imported, tiny_metadata
from redrafter_mlx.errors import UserError

PROMPT = [5, 60, 61, 200, 7, 7, 90, 0, 17, 33, 12, 250, 41, 9, 9, 8]

OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_INNER = INNER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass
class Case:
    """One architecture: mlx-lm's module and settings, and what the file says of them."""

    architecture: str
    module: str
    settings: dict
    metadata: dict = field(default_factory=dict)
    inner: dict = field(default_factory=lambda: INNER)
    extra: dict = field(default_factory=dict)
    norm_offset: int = 0

    @property
    def arguments(self) -> dict:
        sizes = {
            "model_type": self.module,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": len(TOKENS),
            "rope_theta": 500.0,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
        return sizes | self.settings

    def model(self) -> nn.Module:
        """mlx-lm's model with random weights."""
        mx.random.seed(0)
        code = importlib.import_module(f"mlx_lm.models.{self.module}")
        model = code.Model(code.ModelArgs.from_dict(self.arguments))
        if self.module == "gemma3_text":
            model.sanitize({})  # a head of its own is dropped there, when no weights have one
        weights = []
        for name, parameter in tree_flatten(model.parameters()):
            random = mx.random.normal(parameter.shape) * 0.3
            if "norm" in name:
                random = random + 1 - self.norm_offset
            weights.append((name, random))
        model.load_weights(weights)
        return model

    def gguf(self, model: nn.Module, encoding: Encoding = F32) -> Gguf:
        """The model as a file, matrices in one encoding."""
        tensors = {}
        for name, parameter in tree_flatten(model.parameters()):
            weight = np.array(parameter) + ("norm" in name) * self.norm_offset
            tensors[self.gguf_name(name)] = (encoding if weight.ndim > 1 else F32, weight)
        for name, numbers in self.extra.items():
            tensors[name] = (F32, np.float32(numbers))
        return Gguf(self.header(), tensors)

    def gguf_name(self, parameter: str) -> str:
        module, _, kind = parameter.rpartition(".")
        if module in OUTER:
            return f"{OUTER[module]}.{kind}"
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{self.inner[part]}.{kind}"

    def header(self, **changes: object) -> dict:
        sizes = self.arguments
        own = {
            "block_count": sizes["num_hidden_layers"],
            "embedding_length": sizes["hidden_size"],
            "feed_forward_length": sizes["intermediate_size"],
            "attention.key_length": sizes["head_dim"],
            "attention.value_length": sizes["head_dim"],
            **self.metadata,
            **changes,
        }
        usual = tiny_metadata(general__architecture=self.architecture)
        renamed = {key.replace("llama.", f"{self.architecture}."): v for key, v in usual.items()}
        renamed |= {f"{self.architecture}.{key}": value for key, value in own.items()}
        return {key: value for key, value in renamed.items() if value is not None}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_METADATA = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
GEMMA = Case(
    "gemma3",
    "gemma3_text",
    {
        "head_dim": 32,
        "num_hidden_layers": 5,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 32,
    },
    {"attention.sliding_window": 4, "attention.sliding_window_pattern": 2},
    GEMMA_INNER,
    norm_offset=1,
)
LONG, SHORT = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0], [1.0] * 6
PHI = Case("phi3", "phi3", {})
PHI_LONG = Case(
    "phi3",
    "phi3",
    {
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
    },
    {
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": sqrt(1 + log(8) / log(16)),
    },
    extra={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
)

CASES = {
    "qwen2": Case("qwen2", "qwen2", {}),
    "qwen2, untied, yarn": Case(
        "qwen2", "qwen2", {"tie_word_embeddings": False, "rope_scaling": YARN}, YARN_METADATA
    ),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 32}),
    "qwen3, untied, yarn": Case(
        *("qwen3", "qwen3", {"tie_word_embeddings": False, "rope_scaling": YARN}, YARN_METADATA)
    ),
    "gemma3": GEMMA,
    "gemma3, a list of windows": Case(
        *("gemma3", "gemma3_text", GEMMA.settings | {"sliding_window_pattern": 3}),
        {
            "attention.sliding_window": 4,
            "attention.sliding_window_pattern": [1, 1, 0, 1, 1],
            "rope.freq_base_swa": 10000.0,
        },
        GEMMA_INNER,
        norm_offset=1,
    ),
    "gemma3, linear": Case(
        *("gemma3", "gemma3_text"),
        GEMMA.settings | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        GEMMA.metadata | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        GEMMA_INNER,
        norm_offset=1,
    ),
    "phi3": PHI,
    "phi3, untied, long": Case(
        *("phi3", "phi3", PHI_LONG.settings | {"tie_word_embeddings": False}),
        PHI_LONG.metadata,
        extra=PHI_LONG.extra,
    ),
}


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([PROMPT])).astype(mx.float32))


@pytest.mark.parametrize("name", CASES)
def test_the_import_is_mlx_lms_model(tmp_path, name):
    case = CASES[name]
    original = case.model()
    copy, _ = mlx_lm.load(str(imported(tmp_path, case.gguf(original))))
    expected = logits(original)
    error = np.abs(logits(copy) - expected).max()
    print(f"{name}: max |difference of logits| = {error:.1e} of {np.abs(expected).max():.0f}")
    assert error < 1e-4
    assert {str(a.dtype) for _, a in tree_flatten(copy.parameters())} == {"mlx.core.float32"}


@pytest.mark.parametrize(
    ("encoding", "dtype"), [(F16, mx.float16), (BF16, mx.bfloat16)], ids=["F16", "BF16"]
)
def test_a_model_of_16_bits_computes_in_them(tmp_path, encoding, dtype):
    copy, _ = mlx_lm.load(str(imported(tmp_path, GEMMA.gguf(GEMMA.model(), encoding))))
    assert {array.dtype for _, array in tree_flatten(copy.parameters())} == {dtype}


def test_a_mixture_of_k_quants_is_the_model_of_their_values(tmp_path):
    """As llama.cpp's Q4_K_M and its like: another type per part, each in its own width."""
    settings = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    case = Case("qwen3", "qwen3", {**settings, "num_attention_heads": 4, "head_dim": 64})
    model = case.model()
    gguf = case.gguf(model)
    kinds = {block_type.name: block_type.encoding for block_type in BLOCK_TYPES}
    for part, kind in {
        "token_embd": "Q6_K",
        "blk.0.attn_q": "Q4_K",
        "blk.0.attn_k": "Q5_0",
        "blk.0.attn_v": "Q8_0",
        "blk.0.attn_output": "Q2_K",
        "blk.0.ffn_gate": "Q3_K",
        "blk.0.ffn_up": "Q5_K",
        "blk.0.ffn_down": "Q5_1",
    }.items():
        gguf.tensors[f"{part}.weight"] = (kinds[kind], gguf.tensors[f"{part}.weight"][1])
    worth = gguf.decoded()
    names = [name for name, _ in tree_flatten(model.parameters())]
    model.load_weights([(name, mx.array(worth[case.gguf_name(name)])) for name in names])
    directory = imported(tmp_path, gguf)
    copy, _ = mlx_lm.load(str(directory))
    copy.set_dtype(mx.float32)
    expected = logits(model)
    error = (logits(copy) - expected).std() / expected.std()
    print(f"error of logits: {error:.2%} of their spread")
    assert error < 0.03
    widths = json.loads((directory / "config.json").read_text())["quantization"]
    own = {name.rpartition("layers.0.")[2]: bits["bits"] for name, bits in list(widths.items())[2:]}
    assert widths["bits"] == 8
    assert own == {
        "self_attn.q_proj": 4,
        "self_attn.k_proj": 5,
        "mlp.up_proj": 5,
        "mlp.down_proj": 5,
    }


def test_biases_that_mlx_lm_needs_and_the_file_lacks_are_zero(tmp_path):
    case = CASES["qwen2"]
    model = case.model()
    gguf = case.gguf(model)
    for name in [name for name in gguf.tensors if name.endswith(".bias")]:
        del gguf.tensors[name]
    copy, _ = mlx_lm.load(str(imported(tmp_path, gguf)))
    for layer in model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.bias = mx.zeros_like(part.bias)
    assert np.array_equal(logits(copy), logits(model))


# ---------------------------------------------------------------------------------------------
# Refused


def refused(tmp_path: Path, gguf: Gguf) -> str:
    with pytest.raises(UserError) as caught:
        imported(tmp_path, gguf)
    message = str(caught.value)
    assert "tiny.gguf" in message
    assert "\n" not in message
    assert not any((tmp_path / "model").iterdir())
    return message


QWEN2, QWEN3 = CASES["qwen2"], CASES["qwen3"]


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        (QWEN2, {"attention.key_length": 32, "attention.value_length": 32}, "keys of 32"),
        (QWEN2, {"rope.dimension_count": 8}, "RoPE over 8 of 16"),
        (QWEN2, {"embedding_length": None}, "qwen2.embedding_length"),
        (QWEN3, {"expert_count": 8}, "qwen3.expert_count = 8"),
        (QWEN3, {"rope.scaling.type": "longrope"}, "'longrope'"),
        (GEMMA, {"attention.sliding_window": None}, "gemma3.attention.sliding_window"),
        (GEMMA, {"attention.sliding_window": 0}, "gemma3.attention.sliding_window = 0"),
        (GEMMA, {"attention.sliding_window_pattern": None}, "5 layers that all see only a window"),
        (GEMMA, {"attention.sliding_window_pattern": [1, 0, 1, 1, 0]}, "without a period"),
        (GEMMA, {"attention.sliding_window_pattern": [1, 0]}, "without a period"),
        (GEMMA, {"attention.sliding_window_pattern": [1, 1, 1, 1, 1]}, "all see only a window"),
        (GEMMA, {"final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping = 30.0"),
        (PHI, {"rope.dimension_count": 32}, "RoPE over 32 of 16"),
        (PHI, {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "'yarn' in a Phi 3"),
        (PHI_LONG, {"rope.scaling.attn_factor": 1.0}, "phi3.rope.scaling.attn_factor = 1.0"),
        (PHI_LONG, {"rope.dimension_count": 16}, "rope_factors_long.weight with 6 factors for 16"),
    ],
)
def test_what_a_model_cannot_be_is_refused(tmp_path, case, changes, named):
    gguf = case.gguf(case.model())
    gguf.metadata = case.header(**changes)
    assert named in refused(tmp_path, gguf)


@pytest.mark.parametrize(
    ("case", "missing", "added", "named"),
    [
        (QWEN3, "blk.1.attn_q_norm.weight", None, "blk.1.attn_q_norm.weight is missing"),
        (QWEN3, None, "blk.0.attn_output.bias", "attn_output.bias has no place in the qwen3"),
        (QWEN2, None, "blk.0.attn_output.bias", "attn_output.bias has no place in the qwen2"),
        (QWEN2, None, "rope_freqs.weight", "rope_freqs.weight with 64 factors"),
        (GEMMA, "blk.0.post_ffw_norm.weight", None, "post_ffw_norm.weight is missing"),
        (PHI, "blk.0.attn_qkv.weight", None, "attn_qkv.weight is missing"),
        (PHI, None, "blk.0.ffn_gate.weight", "ffn_gate.weight has no place in the phi3"),
        (PHI_LONG, "rope_factors_short.weight", None, "rope_factors_short.weight with 0 factors"),
    ],
)
def test_other_tensors_are_refused(tmp_path, case, missing, added, named):
    gguf = case.gguf(case.model())
    if missing:
        del gguf.tensors[missing]
    if added:
        gguf.tensors[added] = (F32, np.ones(64, np.float32))
    assert named in refused(tmp_path, gguf)

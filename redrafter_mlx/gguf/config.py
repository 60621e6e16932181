"""The mlx-lm configuration of a Llama-architecture GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.blocks import read_tensor
from redrafter_mlx.gguf.file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"

# What all published Llama 3 models have beside the factor; GGUF files do not say it.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Metadata that changes the arithmetic in a way that mlx-lm's Llama does not know, unless it has
# this value.
NEUTRAL = {
    "llama.expert_count": 0,
    "llama.attention.causal": True,
    "llama.attention.scale": 0.0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.max_alibi_bias": 0.0,
    "llama.logit_scale": 0.0,
    "llama.embedding_scale": 0.0,
    "llama.residual_scale": 0.0,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.yarn_log_multiplier": 0.0,
    "llama.rope.scaling.yarn_ext_factor": 1.0,
    "llama.rope.scaling.yarn_attn_factor": 1.0,
}


def llama_config(file: GgufFile) -> dict[str, Any]:
    """config.json without what depends on the tensors, except for scaled RoPE.

    Raises:
        UserError: another architecture, metadata that is missing or contradicts itself, or a
            setting that mlx-lm's Llama cannot express.
    """
    _check_architecture(file)
    hidden_size = _count(file, "llama.embedding_length")
    heads = _count(file, "llama.attention.head_count")
    kv_heads = _count(file, "llama.attention.head_count_kv", heads)
    head_dim = _count(file, "llama.attention.key_length", hidden_size // heads)
    value_dim = _count(file, "llama.attention.value_length", head_dim)
    if heads % kv_heads or value_dim != head_dim or head_dim % 2:
        raise UserError(
            f"{file.path}: {heads} query heads, {kv_heads} key heads, keys of {head_dim} and "
            f"values of {value_dim} numbers do not fit together in a Llama; get the file again"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(file, "llama.block_count"),
        "intermediate_size": _count(file, "llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _number(file, "llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": len(file.need_list("tokenizer.ggml.tokens", str)),
        "max_position_embeddings": _count(file, "llama.context_length"),
        "rope_theta": _number(file, "llama.rope.freq_base", 10000.0),
        # llama.cpp rotates neighbouring pairs and its converter has permuted the rows of q and k
        # to suit; MLX calls that order "traditional". Undoing it would mean to repack weights.
        "rope_traditional": True,
    }
    if scaling := _rope_scaling(file, head_dim, config["rope_theta"]):
        config["rope_scaling"] = scaling
    return config


def _check_architecture(file: GgufFile) -> None:
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{file.path} holds a {architecture!r} model; only GGUF files of architecture 'llama' "
            "can be imported: use an MLX or Hugging Face copy of this model"
        )
    for key, neutral in NEUTRAL.items():
        if (value := file.metadata.get(key, neutral)) != neutral:
            raise _unsupported(file, f"{key} = {value!r}")


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.need(key) if default is None else file.metadata.get(key, default)
    if type(value) is not int or value < 1:
        raise _unsupported(file, f"{key} = {value!r}")
    return value


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.need(key) if default is None else file.metadata.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise _unsupported(file, f"{key} = {value!r}")
    return float(value)


def _unsupported(file: GgufFile, what: str) -> UserError:
    return UserError(
        f"{file.path}: {what} is not supported by the Llama import: use an MLX copy of this model"
    )


def _rope_scaling(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    """mlx-lm's `rope_scaling`; None if positions are not scaled."""
    rotated = _count(file, "llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise _unsupported(file, f"RoPE over {rotated} of {head_dim} dimensions")
    if base <= 1:
        raise _unsupported(file, f"llama.rope.freq_base = {base!r}")
    scaling = _scaling_by_metadata(file)
    if ROPE_FACTORS not in file.tensors:
        return scaling
    if scaling:
        raise _unsupported(file, f"{ROPE_FACTORS} next to {scaling['rope_type']!r} scaling")
    return _scaling_by_factors(file, head_dim, base)


def _scaling_by_metadata(file: GgufFile) -> dict[str, Any] | None:
    # Where a factor stands without a type, llama.cpp scales linearly; so did its old key.
    kind = file.metadata.get("llama.rope.scaling.type", "linear")
    factor = _number(
        file, "llama.rope.scaling.factor", file.metadata.get("llama.rope.scale_linear", 1.0)
    )
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = _count(file, "llama.context_length")
        return {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": _count(
                file, "llama.rope.scaling.original_context_length", length
            ),
            "beta_fast": _number(file, "llama.rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": _number(file, "llama.rope.scaling.yarn_beta_slow", 1.0),
        }
    raise _unsupported(file, f"RoPE scaling {kind!r}")


def _scaling_by_factors(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    """Llama 3's scaling, which GGUF files hold as a tensor: one factor per rotated pair."""
    factors = read_tensor(file, ROPE_FACTORS)["weight"].ravel().astype(np.float64)
    if len(factors) == head_dim // 2:
        if (factors == 1).all():
            return None
        scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **LLAMA3_ROPE}
        expected = _llama3_factors(scaling, head_dim, base)
        if np.allclose(factors, expected, rtol=1e-4, atol=0):
            return scaling
    raise _unsupported(
        file, f"{ROPE_FACTORS} with {len(factors)} factors other than Llama 3's for its RoPE"
    )


def _llama3_factors(scaling: dict[str, Any], head_dim: int, base: float) -> np.ndarray:
    """(head_dim / 2,): by what each wavelength grows.

    Not at all below `original / high`, by `factor` above `original / low`, and in between so that
    frequencies are interpolated linearly.

    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - unscaled) / scaling["factor"] + unscaled)

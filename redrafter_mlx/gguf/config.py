"""The mlx-lm configuration of the model in a GGUF file."""

from __future__ import annotations

from typing import Any

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.architectures import architecture_of
from redrafter_mlx.gguf.file import GgufFile
from redrafter_mlx.gguf.metadata import count, key, number, unsupported
from redrafter_mlx.gguf.rope import rope_config

# Metadata that changes the arithmetic in ways that mlx-lm's models do not support, unless it has
# this value.
NEUTRAL = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}

# What all Gemma 3 models have in common, so that their GGUF files may leave it out.
GEMMA_PATTERN = 6
GEMMA_LOCAL_BASE = 10000.0
GEMMA_27B_LAYERS = 62


def model_config(file: GgufFile) -> dict[str, Any]:
    """The part of config.json that follows from the metadata, and from the tensors that scale RoPE.

    Raises:
        UserError: an unknown architecture, metadata that is missing or contradicts itself, or a
            setting that mlx-lm's model does not support.
    """
    architecture = architecture_of(file)
    for name, neutral in NEUTRAL.items():
        if (value := file.metadata.get(key(file, name), neutral)) != neutral:
            raise unsupported(file, f"{key(file, name)} = {value!r}")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **_sizes(file),
        "rms_norm_eps": number(file, "attention.layer_norm_rms_epsilon"),
        "vocab_size": len(file.need_list("tokenizer.ggml.tokens", str)),
        "max_position_embeddings": count(file, "context_length"),
    }
    config |= rope_config(file, config)
    if architecture.model_type == "gemma3_text":
        config |= _gemma(file, config)
    return config


def _sizes(file: GgufFile) -> dict[str, int]:
    hidden_size = count(file, "embedding_length")
    heads = count(file, "attention.head_count")
    kv_heads = count(file, "attention.head_count_kv", heads)
    usual = hidden_size // heads
    head_dim = count(file, "attention.key_length", usual)
    value_dim = count(file, "attention.value_length", head_dim)
    free = architecture_of(file).free_head_dim
    if heads % kv_heads or value_dim != head_dim or head_dim % 2 or not (free or head_dim == usual):
        raise UserError(
            f"{file.path}: {heads} query heads, {kv_heads} key heads, keys of {head_dim} and "
            f"values of {value_dim} numbers do not fit together in this kind of model with hidden "
            f"size {hidden_size}; get the file again"
        )
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count(file, "block_count"),
        "intermediate_size": count(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _gemma(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's sliding windows, the RoPE of layers that have one, and its attention scale."""
    layers, scalar = config["num_hidden_layers"], config["head_dim"]
    if layers == GEMMA_27B_LAYERS:  # the 27B model alone does not scale by the size of its heads
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": count(file, "attention.sliding_window"),
        "sliding_window_pattern": _window_period(file, layers),
        "rope_local_base_freq": number(file, "rope.freq_base_swa", GEMMA_LOCAL_BASE),
        "query_pre_attn_scalar": scalar,
    }


def _window_period(file: GgufFile, layers: int) -> int:
    """The period of full attention: each layer whose number is a multiple of it sees all the text.

    GGUF has that number, or a list that says for each layer whether it sees only a window.
    """
    name = "attention.sliding_window_pattern"
    pattern = file.metadata.get(key(file, name), GEMMA_PATTERN)
    if isinstance(pattern, list):
        period = next((at for at, window in enumerate(pattern, 1) if not window), layers + 1)
        if [bool(window) for window in pattern] != [at % period > 0 for at in range(1, layers + 1)]:
            raise unsupported(file, f"a {key(file, name)} without a period")
    else:
        period = count(file, name, GEMMA_PATTERN)
    if period > layers:  # mlx-lm needs a layer with full attention to know the text's length
        raise unsupported(file, f"a model of {layers} layers that all see only a window")
    return period

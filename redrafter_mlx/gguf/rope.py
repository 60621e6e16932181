"""The rotary embedding of a GGUF file's model, mainly its scaling, as mlx-lm's configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from redrafter_mlx.gguf.architectures import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from redrafter_mlx.gguf.blocks import quantised_bits, read_tensor
from redrafter_mlx.gguf.file import GgufFile
from redrafter_mlx.gguf.metadata import count, key, number, unsupported

# What all published Llama 3 models have besides the factor; GGUF files leave it out.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of config.json about RoPE; `config` already has the model's sizes."""
    model, head_dim = config["model_type"], config["head_dim"]
    base = number(file, "rope.freq_base", 10000.0)
    rotated = count(file, "rope.dimension_count", head_dim)
    if base <= 1:
        raise unsupported(file, f"{key(file, 'rope.freq_base')} = {base!r}")
    found: dict[str, Any] = {"rope_theta": base}
    if model == "phi3":
        if rotated > head_dim or int(head_dim * (rotated / head_dim)) != rotated or rotated % 2:
            raise unsupported(file, f"RoPE over {rotated} of {head_dim} dimensions")
        return found | _phi_rope(file, config, rotated)
    if rotated != head_dim:
        raise unsupported(file, f"RoPE over {rotated} of {head_dim} dimensions")
    _check_attention_factor(file, 1.0)
    if model == "llama":
        # llama.cpp rotates neighbouring pairs, and its converter has permuted the rows of q and k
        # accordingly. MLX calls that order "traditional"; to undo it, weights would be repacked.
        found["rope_traditional"] = True
    if scaling := _rope_scaling(file, head_dim, base):
        found["rope_scaling"] = scaling
    return found


def _rope_scaling(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    """mlx-lm's `rope_scaling`; None if positions are not scaled."""
    scaling = _scaling_by_metadata(file)
    if ROPE_FACTORS not in file.tensors:
        return scaling
    if scaling:
        raise unsupported(file, f"{ROPE_FACTORS} next to {scaling['rope_type']!r} scaling")
    return _scaling_by_factors(file, head_dim, base)


def _scaling_by_metadata(file: GgufFile) -> dict[str, Any] | None:
    # A factor without a type means linear scaling in llama.cpp, and so does the older key.
    kind = file.metadata.get(key(file, "rope.scaling.type"), "linear")
    factor = number(file, "rope.scaling.factor", number(file, "rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = count(file, "context_length")
        return {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": count(
                file, "rope.scaling.original_context_length", length
            ),
            "beta_fast": number(file, "rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": number(file, "rope.scaling.yarn_beta_slow", 1.0),
        }
    raise unsupported(file, f"RoPE scaling {kind!r}")


def _scaling_by_factors(file: GgufFile, head_dim: int, base: float) -> dict[str, Any] | None:
    """Llama 3's scaling, which GGUF files store as a tensor: one factor per rotated pair."""
    factors = _factors(file, ROPE_FACTORS)
    if len(factors) == head_dim // 2:
        if (factors == 1).all():
            return None
        scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **LLAMA3_ROPE}
        expected = _llama3_factors(scaling, head_dim, base)
        if np.allclose(factors, expected, rtol=1e-4, atol=0):
            return scaling
    raise unsupported(
        file, f"{ROPE_FACTORS} with {len(factors)} factors other than Llama 3's for its RoPE"
    )


def _llama3_factors(scaling: dict[str, Any], head_dim: int, base: float) -> np.ndarray:
    """(head_dim / 2,): how much longer each wavelength becomes.

    1 below `original / high`, `factor` above `original / low`, and in between such that the
    frequencies are interpolated linearly.

    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - unscaled) / scaling["factor"] + unscaled)


def _phi_rope(file: GgufFile, config: dict[str, Any], rotated: int) -> dict[str, Any]:
    """Phi 3's RoPE: over part of each head and, for long contexts, with a factor per pair."""
    found: dict[str, Any] = {"partial_rotary_factor": rotated / config["head_dim"]}
    if not file.tensors.keys() & {LONG_FACTORS, SHORT_FACTORS}:
        _check_attention_factor(file, 1.0)
        if scaling := _scaling_by_metadata(file):
            raise unsupported(file, f"RoPE scaling {scaling['rope_type']!r} in a Phi 3")
        return found
    length = config["max_position_embeddings"]
    original = count(file, "rope.scaling.original_context_length", length)
    # mlx-lm derives its attention factor from the two lengths; the file's must agree.
    grown = math.log(length) - math.log(original)
    _check_attention_factor(file, math.sqrt(1 + max(0, grown) / math.log(max(original, 2))))
    factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    scaling = {"type": "longrope"}
    for entry, name in factors.items():
        scaling[entry] = _factors(file, name).tolist() if name in file.tensors else []
        if len(scaling[entry]) != rotated // 2:
            raise unsupported(
                file, f"{name} with {len(scaling[entry])} factors for {rotated} dimensions"
            )
    return found | {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _factors(file: GgufFile, name: str) -> np.ndarray:
    if quantised_bits(file, name):
        raise unsupported(file, f"{name} in {file.tensors[name].kind}")
    return read_tensor(file, name)["weight"].ravel().astype(np.float64)


def _check_attention_factor(file: GgufFile, expected: float) -> None:
    name = "rope.scaling.attn_factor"
    if not math.isclose(number(file, name, 1.0), expected, rel_tol=1e-3):
        raise unsupported(file, f"{key(file, name)} = {file.metadata.get(key(file, name), 1.0)!r}")

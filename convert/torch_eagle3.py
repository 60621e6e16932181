"""EAGLE-3 (arXiv 2503.01840) in PyTorch and in MLX.

After ROWS places of a text come STEPS on states of its own. These are random too: otherwise
rounding errors would grow from step to step and look like a fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from redrafter_mlx.drafters.eagle3 import KIND
from redrafter_mlx.drafters.published import load_published

from .formula import ROWS, SCORES, STEPS, Formula, Inputs, normal
from .torch_parts import Attention, Weights, mlp, shape_of


def _eagle3_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    ids = generator.integers(0, config.vocab_size, ROWS + STEPS)
    return {
        "captured": normal(generator, ROWS, config.captured * config.target_hidden_size),
        "own": normal(generator, STEPS, config.hidden_size),
        "embedded": normal(generator, ROWS + STEPS, config.hidden_size),
        "ids": ids.astype(np.int32),
    }


def _eagle3_in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    torch, config = weights.torch, weights.head.config
    embedded = torch.from_numpy(given["embedded"])
    if config.own_embedding:
        embedded = weights.picked("embed_tokens", given["ids"])
    captured = torch.from_numpy(given["captured"])
    norm = lambda name, x: weights.normed(name, x, config.layer.rms_norm_eps)
    if config.norm_input:
        captured = norm("input_norm", captured)
    if config.norm_each:
        parts = captured.split(config.target_hidden_size, dim=-1)
        captured = torch.cat([norm(f"fc_norm.{i}", x) for i, x in enumerate(parts)], dim=-1)
    hidden = torch.cat([weights.linear("fc", captured), torch.from_numpy(given["own"])])
    normed = norm("layers.0.hidden_norm", hidden)
    read = torch.cat([norm("layers.0.input_layernorm", embedded), normed], dim=-1)
    hidden = normed if config.normed_residual else hidden
    attention = Attention(weights, shape_of(torch, config.layer))
    for i in range(config.layers):
        read = norm(f"layers.{i}.input_layernorm", hidden) if i else read
        hidden = hidden + attention(f"layers.{i}.self_attn", read)
        read = norm(f"layers.{i}.post_attention_layernorm", hidden)
        hidden = hidden + mlp(weights, f"layers.{i}.mlp", read)
    normed = norm("norm", hidden)
    if config.own_output:
        return {SCORES: weights.linear("lm_head", normed)}
    return {"hidden": normed}


def _eagle3_in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    head, _ = load_published(KIND, directory, mx.float32)
    embedded = mx.array(given["embedded"])
    if head.config.own_embedding:
        embedded = head.embed_tokens(mx.array(given["ids"]))
    hidden = mx.concatenate([head.read(mx.array(given["captured"])), mx.array(given["own"])])
    caches = [KVCache() for _ in range(head.caches)]
    found = head.outputs(head(embedded[None], hidden[None], "causal", caches)[0])
    return {SCORES if head.config.own_output else "hidden": found}


EAGLE3 = Formula(_eagle3_inputs, _eagle3_in_torch, _eagle3_in_mlx, depth=lambda config: 2)

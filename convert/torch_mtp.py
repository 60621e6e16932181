"""MTP heads of Qwen3-Next and Qwen3.5, dense and with experts, in PyTorch and in MLX.

A text of ROWS tokens. A router decides which experts compute, and rounding may turn its near ties;
so its scores are compared by themselves, and the experts are those that MLX chose.

Shape letters: R rows, h hidden size, m size of an expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from redrafter_mlx.drafters.mtp import KIND
from redrafter_mlx.drafters.published import load_published

from .formula import ROWS, Formula, Inputs, normal
from .head import Head
from .torch_parts import Attention, Shape, Weights, gated, mlp

ROUTER = "router"


def _inputs(config: Any, generator: np.random.Generator) -> Inputs:
    shape = ROWS, config.hidden_size
    return {"embedded": normal(generator, *shape), "states": normal(generator, *shape)}


def _in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    torch, layer = weights.torch, weights.head.config.layer
    eps, attn = layer.input_layernorm.eps, layer.self_attn
    # published weights of norms leave out a one, which MLX checkpoints may have added
    centred = float(weights.vector("layer.input_layernorm.weight").mean() < 0.5)
    norm = lambda name, x: weights.normed(name, x, eps, centred)
    embedded, hidden = (torch.from_numpy(given[key]) for key in ("embedded", "states"))
    joined = [norm("norm_embedding", embedded), norm("norm_hidden", hidden)]
    hidden = weights.linear("fc", torch.cat(joined, dim=-1))
    steps = torch.arange(0, attn.rope.dims, 2) / attn.rope.dims
    heads = attn.num_attention_heads, attn.num_key_value_heads
    shape = Shape(*heads, eps, attn.rope.base**-steps, centred=centred, gated=True)
    read = norm("layer.input_layernorm", hidden)
    hidden = hidden + Attention(weights, shape)("layer.self_attn", read)
    read = norm("layer.post_attention_layernorm", hidden)
    if ROUTER not in given:
        return {"hidden": norm("norm", hidden + mlp(weights, "layer.mlp", read))}
    scores = weights.linear("layer.mlp.gate", read)
    hidden = hidden + _experts(weights, read, scores, torch.from_numpy(given[ROUTER]))
    return {"hidden": norm("norm", hidden), ROUTER: scores}


def _experts(weights: Weights, x: Any, scores: Any, choosing: Any) -> Any:
    """(R, h) the sum of the chosen experts, by their shares, and the expert that all rows share.

    scores    (R, experts) of the router, of which the shares are made
    choosing  (R, experts) whose largest say which experts are chosen
    """
    block = weights.head.config.layer.mlp
    shares = scores.softmax(dim=-1)
    chosen = choosing.topk(block.top_k, dim=-1).indices
    shares = shares.gather(-1, chosen)
    if block.norm_topk_prob:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    found = weights.linear("layer.mlp.shared_expert_gate", x).sigmoid()
    found = found * mlp(weights, "layer.mlp.shared_expert", x)
    for number in chosen.unique().tolist():
        rows, places = (chosen == number).nonzero(as_tuple=True)
        each = gated(weights.torch, x[rows], *_expert(weights, number))
        found[rows] += shares[rows, places, None] * each
    return found


def _expert(weights: Weights, number: int) -> list[Any]:
    """Gate (m, h), up (m, h) and down (h, m) of one expert: published alone, fused, or stacked."""
    place = "layer.mlp"
    if f"{place}.experts.gate_up_proj" in weights:
        both, down = (
            weights.rows(f"{place}.experts.{name}", number, number + 1)[0]
            for name in ("gate_up_proj", "down_proj")
        )
        return [*both.chunk(2), down]
    names = ("gate_proj", "up_proj", "down_proj")
    if f"{place}.switch_mlp.gate_proj.weight" in weights:
        each = (weights.rows(f"{place}.switch_mlp.{n}", number, number + 1)[0] for n in names)
    else:
        each = (weights.whole(f"{place}.experts.{number}.{n}") for n in names)
    return list(each)


class _Heard(nn.Module):
    """A layer whose last output is kept."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        self.last = self.layer(x)
        return self.last


def _in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    head, _ = load_published(KIND, directory, mx.float32)
    block = head.layer.mlp
    if "gate" in block:
        block.gate = _Heard(block.gate)
    embedded, hidden = (mx.array(given[key])[None] for key in ("embedded", "states"))
    found = {"hidden": head(embedded, head.read(hidden), "causal", [KVCache()])[0]}
    return found | ({ROUTER: block.gate.last[0]} if "gate" in block else {})


def _is_qwen(head: Head) -> bool:
    return "qwen3_5" in head.config.family.model_types and head.config.depths == 1


MTP = Formula(_inputs, _in_torch, _in_mlx, depth=lambda config: 2, knows=_is_qwen)

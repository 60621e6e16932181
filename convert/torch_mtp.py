"""Multi-token-prediction heads in PyTorch and in MLX.

A text of ROWS tokens, for each head on states of its own. A router decides which experts compute,
and rounding may turn its near ties; so that by which it chooses is compared by itself, and the
experts are those that MLX chose. What chooses the places of sparse attention is not compared: among
so few places it chooses all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from redrafter_mlx.drafters.mtp import KIND, MTPHead
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError

from .formula import ROWS, Formula, Inputs, normal
from .head import Head
from .torch_experts import experts, ranks
from .torch_parts import (
    YARN,
    Attention,
    LatentAttention,
    Rotary,
    Shape,
    Weights,
    mlp,
    rotary_of,
    yarn_stretch,
)

LATENT = "layer.self_attn.kv_b_proj.weight"


def _inputs(config: Any, generator: np.random.Generator) -> Inputs:
    shape = config.depths, ROWS, config.hidden_size
    return {"embedded": normal(generator, *shape), "states": normal(generator, *shape)}


def _in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    found = {}
    for depth in range(weights.head.config.depths):
        inputs = {
            name: weights.torch.from_numpy(x[depth] if name in ("embedded", "states") else x)
            for name, x in given.items()
        }
        found |= _head(_of_depth(weights, depth), inputs, depth)
    return found


def _of_depth(weights: Weights, depth: int) -> Weights:
    """The weights of one head; what several share is the first one's."""
    head = weights.head
    if head.config.depths == 1:
        return weights
    of = lambda depth: {
        name.removeprefix(f"depths.{depth}."): tensor
        for name, tensor in head.tensors.items()
        if name.startswith(f"depths.{depth}.")
    }
    return Weights(weights.torch, replace(head, tensors=of(0) | of(depth)))


def _head(weights: Weights, given: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """What one head computes, by part."""
    torch, config, found = weights.torch, weights.head.config, {}
    family, eps, centred = config.family, config.first_norm.eps, 0.0
    if family.centred:  # published norms leave out a one, which MLX checkpoints may have added
        centred = float(weights.vector("layer.input_layernorm.weight").mean() < 0.5)
    norm = lambda name, x: weights.normed(name, x, eps, centred)
    joined = [norm("norm_embedding", given["embedded"]), norm("norm_hidden", given["states"])]
    hidden = weights.linear("fc", torch.cat(joined[:: -1 if family.hidden_first else 1], dim=-1))
    for place, layer in config.layers(depth).items():
        for before, part in _parts(layer).items():
            name, x = f"{place}.{part}", norm(f"{place}.{before}", hidden)
            if "o_proj" in layer[part]:
                hidden = hidden + _attention(weights, layer[part], centred)(name, x)
            elif "gate" not in layer[part]:
                hidden = hidden + mlp(weights, name, x)
            else:
                found[f"router {depth}"] = ranks(weights, name, x)
                found[f"chosen {depth}"] = chosen = given[f"chosen {depth}"]
                hidden = hidden + experts(weights, name, layer[part], x, chosen)
    last = "norm" in family.parts
    return found | {f"hidden {depth}": norm("norm", hidden) if last else hidden}


def _parts(layer: nn.Module) -> dict[str, str]:
    """The norms of a layer, or of a block, and what reads each of them."""
    if "mixer" in layer:
        return {"norm": "mixer"}
    return {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}


def _attention(weights: Weights, attn: nn.Module, centred: float) -> Attention | LatentAttention:
    """The attention that mlx-lm's module describes."""
    torch, model = weights.torch, weights.head.config.model
    args = getattr(model, "language_model", model).args
    setting = lambda *names: next(getattr(attn, name) for name in names if hasattr(attn, name))
    heads = setting("num_attention_heads", "num_heads", "n_heads")
    rotary = _rotary(torch, attn, args)
    if LATENT in weights:
        scaling = args.rope_scaling or {}
        scale = attn.q_head_dim**-0.5
        if scaling.get("mscale_all_dim"):
            scale *= yarn_stretch(scaling, "mscale_all_dim", 0) ** 2
        eps, plain = attn.kv_a_layernorm.eps, attn.qk_nope_head_dim
        return LatentAttention(weights, heads, attn.kv_lora_rank, plain, eps, scale, rotary)
    shared = setting("num_key_value_heads", "n_kv_heads")
    eps = attn.q_norm.eps if "q_norm" in attn else 0.0
    gated = weights.head.config.family.centred  # Qwen's
    return Attention(weights, Shape(heads, shared, eps, rotary, centred, gated))


def _rotary(torch: Any, attn: nn.Module, args: Any) -> Rotary:
    if "rope" not in attn:
        return Rotary(torch.zeros(0))
    rope = attn.rope
    if isinstance(rope, nn.RoPE):
        steps = torch.arange(0, rope.dims, 2) / rope.dims
        return Rotary(rope.scale * rope.base**-steps, rope.traditional)
    kind = (args.rope_scaling or {}).get("rope_type", (args.rope_scaling or {}).get("type"))
    if kind not in YARN:
        raise UserError(f"--verify has no formula for rope scaling {kind}: leave it out")
    return rotary_of(torch, args, rope.dims, rope.traditional)


class _Heard(nn.Module):
    """A block's router, of which is kept what it says of the last rows.

    ranks   (R, E) by what experts are chosen
    chosen  (R, k) their numbers
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.router, self._count = block.gate, getattr(block, "top_k", 0)

    def __call__(self, x: mx.array):
        found = self.router(x)
        if isinstance(found, mx.array):
            self.ranks = found[0]
            self.chosen = mx.argpartition(-self.ranks, kth=self._count - 1, axis=-1)
            self.chosen = self.chosen[:, : self._count]
        else:
            bias = self.router.e_score_correction_bias
            self.ranks = mx.sigmoid(x[0] @ self.router.weight.T) + bias
            self.chosen = found[0][0]
        return found


def _in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    head, _ = load_published(KIND, directory, mx.float32)
    found, heads = {}, [head] if isinstance(head, MTPHead) else head.depths
    for depth, one in enumerate(heads):
        blocks = one.layer if isinstance(one.layer, list) else [one.layer]
        routed = [block[part] for block in blocks for part in _parts(block).values()]
        routed = [block for block in routed if "gate" in block]
        for block in routed:
            block.gate = _Heard(block)
        embedded, states = (mx.array(given[key][depth])[None] for key in ("embedded", "states"))
        caches = [KVCache() for _ in range(one.caches)]
        found[f"hidden {depth}"] = one(embedded, one.read(states), "causal", caches)[0]
        for block in routed:
            found[f"router {depth}"] = block.gate.ranks
            found[f"chosen {depth}"] = block.gate.chosen.astype(mx.int64)
    return found


def _is_known(head: Head) -> bool:
    """Keys and values must be as published; mlx-lm's own files have them apart."""
    config, place = head.config, "" if head.config.depths == 1 else "depths.0."
    attn = config.layer.get("self_attn", {})
    latent = "kv_a_proj_with_mqa" in attn
    sparse = attn["indexer"].index_topk < ROWS if "indexer" in attn else False
    return not sparse and (not latent or place + LATENT in head.tensors)


MTP = Formula(_inputs, _in_torch, _in_mlx, depth=lambda config: 2, knows=_is_known)

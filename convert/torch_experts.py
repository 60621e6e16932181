"""A layer's experts in PyTorch: a router, the experts it chooses, and those that all rows share.

Shape letters: R rows, h hidden size, m size of an expert, E experts, k of them chosen for a row.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .torch_parts import Weights, gated, mlp

BIAS = "e_score_correction_bias"


def ranks(weights: Weights, place: str, x: Any) -> Any:
    """(R, E) by what the router chooses: its logits, or their sigmoids and a bias."""
    logits, bias = weights.linear(f"{place}.gate", x), f"{place}.gate.{BIAS}"
    return logits.sigmoid() + weights.vector(bias) if bias in weights else logits


def experts(weights: Weights, place: str, block: nn.Module, x: Any, chosen: Any) -> Any:
    """(R, h) the sum of the chosen experts, by their shares, and of those that all rows share.

    place   of the block's tensors
    block   mlx-lm's, for its settings
    chosen  (R, k) numbers of experts
    """
    of = lambda name: f"{place}.{name}"
    shares = _shares(weights, of("gate"), block, x, chosen)
    found = _shared(weights, place, x)
    low = weights.linear(of("fc1_latent_proj"), x) if of("fc1_latent_proj.weight") in weights else x
    y = weights.torch.zeros_like(low)
    for number in chosen.unique().tolist():
        rows, places = (chosen == number).nonzero(as_tuple=True)
        each = _computed(weights.torch, low[rows], _expert(weights, place, number))
        y[rows] += shares[rows, places, None] * each
    return found + (y if low is x else weights.linear(of("fc2_latent_proj"), y))


def _shares(weights: Weights, gate: str, block: nn.Module, x: Any, chosen: Any) -> Any:
    """(R, k) by what share each chosen expert counts."""
    logits, sigmoids = weights.linear(gate, x), f"{gate}.{BIAS}" in weights
    settings = block.gate if sigmoids else block
    shares = logits.sigmoid() if sigmoids else logits.softmax(dim=-1)
    shares = shares.gather(-1, chosen)
    if settings.norm_topk_prob and chosen.shape[-1] > 1:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares * getattr(settings, "routed_scaling_factor", 1)


def _shared(weights: Weights, place: str, x: Any) -> Any:
    """(R, h) what the experts that all rows share give."""
    if f"{place}.shared_expert_gate.weight" in weights:
        share = weights.linear(f"{place}.shared_expert_gate", x).sigmoid()
        return share * mlp(weights, f"{place}.shared_expert", x)
    name = f"{place}.shared_experts"
    if f"{name}.gate_proj.weight" in weights:
        return mlp(weights, name, x)
    if f"{name}.up_proj.weight" in weights:
        squared = weights.linear(f"{name}.up_proj", x).relu() ** 2
        return weights.linear(f"{name}.down_proj", squared)
    return weights.torch.zeros_like(x)


def _computed(torch: Any, x: Any, matrices: list[Any]) -> Any:
    """What an expert makes of rows x: of gate, up and down, or of up and down."""
    if len(matrices) == 3:
        return gated(torch, x, *matrices)
    up, down = matrices
    return ((x @ up.T).relu() ** 2) @ down.T


def _expert(weights: Weights, place: str, number: int) -> list[Any]:
    """Gate (m, h) if it has one, up (m, h) and down (h, m): published alone, fused, or stacked."""
    if f"{place}.experts.gate_up_proj" in weights:
        both, down = (
            weights.rows(f"{place}.experts.{name}", number, number + 1)[0]
            for name in ("gate_up_proj", "down_proj")
        )
        return [*both.chunk(2), down]
    names = ("gate_proj", "up_proj", "down_proj")
    if f"{place}.switch_mlp.up_proj.weight" in weights:
        stacked = [f"{place}.switch_mlp.{name}" for name in names]
        found = [name for name in stacked if f"{name}.weight" in weights]
        return [weights.rows(name, number, number + 1)[0] for name in found]
    alone = [f"{place}.experts.{number}.{name}" for name in names]
    return [weights.whole(name) for name in alone if f"{name}.weight" in weights]

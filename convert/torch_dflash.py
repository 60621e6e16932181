"""DFlash (arXiv 2602.06036), DFlash 2 and DSpark in PyTorch and in MLX.

One block after ROWS places of a text, and what the tokens before its rows add to their scores.

Shape letters: B rows of a block, h hidden size, L places that a block predicts, D draft vocabulary,
r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.attention import TextKeys
from redrafter_mlx.drafters.dflash import KIND
from redrafter_mlx.drafters.published import load_published

from .formula import ROWS, SCORES, Formula, Inputs, normal
from .torch_parts import Attention, Weights, mlp, shape_of


def _inputs(config: Any, generator: np.random.Generator) -> Inputs:
    size = config.layer.hidden_size
    found = {
        "captured": normal(generator, ROWS, len(config.reads) * size),
        "embedded": normal(generator, config.block_size, size),
        "before": generator.integers(0, config.vocab_size, config.depths).astype(np.int32),
    }
    if config.candidates:
        found["own"] = normal(generator, config.depths, config.draft_vocab_size)
    return found


def _in_torch(weights: Weights, given: Inputs) -> dict[str, Any]:
    torch, config = weights.torch, weights.head.config
    norm = lambda name, x: weights.normed(name, x, config.layer.rms_norm_eps)
    context = norm("hidden_norm", weights.linear("fc", torch.from_numpy(given["captured"])))
    hidden = torch.from_numpy(given["embedded"])
    attention = Attention(weights, shape_of(torch, config.layer, config.interleaved))
    places = torch.arange(len(context) + len(hidden))
    ahead = places - places[len(context) :, None]
    for i, sight in enumerate(config.sights):
        unseen = ahead > 0 if sight.causal else ahead > len(hidden)
        unseen = unseen | (ahead <= -sight.window) if sight.window else unseen
        attend = lambda x, i=i, unseen=unseen: attention(
            f"layers.{i}.self_attn", x, context, unseen
        )
        feed = lambda x, i=i: mlp(weights, f"layers.{i}.mlp", x)
        for sublayer, norm_name, convolution in (
            (attend, "input_layernorm", "attention_conv"),
            (feed, "post_attention_layernorm", "mlp_conv"),
        ):
            read = norm(f"layers.{i}.{norm_name}", hidden)
            hidden = hidden + _convolved(weights, f"layers.{i}.{convolution}", sublayer, read)
    found = {"hidden": norm("norm", hidden)}
    predicting = found["hidden"][-config.depths :]
    if config.candidates:
        return found | {SCORES: _selected(weights, predicting, given)}
    if config.markov:
        return found | {SCORES: _biases(weights, predicting, given)}
    return found


def _convolved(weights: Weights, name: str, sublayer: Callable[[Any], Any], x: Any) -> Any:
    """(B, h): DFlash 2's convolutions before and after a sublayer, with weights computed from x.

    Row b becomes the sum over taps t of kernel[b, t] * row[b - t]; rows before the first are 0.
    """
    config = weights.head.config
    if not config.conv_taps:
        return sublayer(x)
    asked = weights.linear(f"{name}.kernel_projection", x)
    asked = asked.unflatten(-1, (2, config.conv_taps, -1))
    kernels = weights.vector(f"{name}.base_kernel") + asked.repeat_interleave(
        config.conv_group, dim=-1
    )
    before, after = kernels.unbind(dim=1)
    return _convolve(weights.torch, sublayer(_convolve(weights.torch, x, before)), after)


def _convolve(torch: Any, x: Any, kernels: Any) -> Any:
    """(B, h) of rows (B, h) and kernels (B, taps, h)."""
    found = torch.zeros_like(x)
    for tap in range(kernels.shape[1]):
        found[tap:] += kernels[tap:, tap] * x[: len(x) - tap]
    return found


def _selected(weights: Weights, hidden: Any, given: Inputs) -> Any:
    """(L, D) what DFlash 2's selector adds to the scores of a place's candidates; 0 for others."""
    torch = weights.torch
    name = "candidate_selector"
    before = weights.picked(f"{name}.predecessor_codebook", given["before"])
    read = before * weights.linear(f"{name}.hidden_projection", hidden)
    added = weights.linear(f"{name}.successor_codebook", read)
    chosen = torch.from_numpy(given["own"]).topk(weights.head.config.candidates, dim=-1).indices
    return torch.zeros_like(added).scatter(-1, chosen, added.gather(-1, chosen))


def _biases(weights: Weights, hidden: Any, given: Inputs) -> Any:
    """(L, D) what DSpark's Markov head adds to the scores of places, one after the other."""
    torch, kind, name = weights.torch, weights.head.config.markov, "markov_head"
    tokens = weights.picked(f"{name}.markov_w1", given["before"])
    state, found = torch.zeros_like(tokens[0]), []
    for place, token in zip(hidden, tokens, strict=True):
        read = token
        if kind == "gated":
            both = torch.cat([place, token])
            read = weights.linear(f"{name}.gate_proj", both).sigmoid() * token
        elif kind == "rnn":
            joint = weights.linear(f"{name}.joint_proj", torch.cat([state, token, place]))
            gate, new, out = joint.chunk(3)
            state = torch.lerp(new.tanh(), state, gate.sigmoid())
            read = out.tanh()
        found.append(weights.linear(f"{name}.markov_w2", read))
    return torch.stack(found)


def _in_mlx(directory: Path, given: Inputs) -> dict[str, mx.array]:
    head, _ = load_published(KIND, directory, mx.float32)
    texts = [TextKeys() for _ in head.layers]
    head.take_in(mx.array(given["captured"]), texts)
    memory = [x for text in texts for x in (text.keys, text.values)]
    hidden = head(mx.array(given["embedded"])[None], [*memory, mx.array([ROWS])])[0]
    if head.link is None:
        return {"hidden": hidden}
    config, state, read = head.config, None, []
    before = mx.array(given["before"])
    for place in range(config.depths):
        row = place + config.block_size - config.depths
        each, state = head.link.read(hidden[row : row + 1], before[place : place + 1], state)
        read.append(each)
    own = given.get("own", np.zeros((config.depths, config.draft_vocab_size), np.float32))
    own = mx.array(own)
    scores = head.link.scores(own, mx.arange(config.depths), mx.concatenate(read))
    return {"hidden": hidden, SCORES: mx.where(mx.isfinite(scores), scores - own, 0)}


def _depth(config: Any) -> float:
    """Convolutions multiply rows by weights computed from them, and so their errors too."""
    return 4 if config.conv_taps else 2


DFLASH = Formula(_inputs, _in_torch, _in_mlx, _depth)

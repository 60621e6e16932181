"""What each kind of head computes: in PyTorch from the published formulas, and in MLX.

Shape letters: R rows, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from redrafter_mlx.drafters.attention import TextKeys
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.drafters.kinds import KINDS
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device

from .head import Head
from .reading import read_head
from .sources import open_source
from .torch_parts import Attention, Shape, Weights, mlp, rms_normed, shape_of
from .weights import as_mlx

ROWS, STEPS = 16, 4
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Formula:
    """One kind of head in both worlds.

    inputs    shape, generator -> random inputs
    in_torch  weights of the source, inputs -> (R, D) logits, or what the target's output layer
              reads
    in_mlx    directory of the result, inputs -> the same
    depth     how many times as far as through a recurrent head rounding has to go
    knows     whether it is that of this head too, where a kind has several
    """

    inputs: Callable[[Any, np.random.Generator], Inputs]
    in_torch: Callable[[Weights, Inputs], Any]
    in_mlx: Callable[[Path, Inputs], mx.array]
    depth: float = 1
    knows: Callable[[Head], bool] = lambda head: True


def formula_of(head: Head) -> Formula:
    """The formula of a head's kind; UserError if there is none."""
    found = FORMULAS.get(head.kind)
    if found is None or not found.knows(head):
        this = f"this head of the kind {head.kind}" if found else f"heads of the kind {head.kind}"
        raise UserError(f"--verify knows no formula for {this}: leave it out")
    return found


def _normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape, np.float32)


# ---------------------------------------------------------------------------------------------
# Recurrent (arXiv 2403.09919)


def _recurrent_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    return {
        "context": _normal(generator, ROWS, config.context_size),
        "embedded": _normal(generator, STEPS, ROWS, config.hidden_size),
    }


def _recurrent_in_torch(weights: Weights, given: Inputs) -> Any:
    torch, config = weights.torch, weights.head.config
    silu = torch.nn.functional.silu
    final, *fused = torch.from_numpy(given["context"]).split(config.hidden_size, dim=-1)
    context = torch.cat([final, *(rms_normed(torch, x, 1e-6) for x in fused)], dim=-1)
    state, found = torch.zeros_like(final), []
    for embedded in torch.from_numpy(given["embedded"]):
        if config.rnn:
            state = silu(weights.linear("rnn_w", embedded) + weights.linear("rnn_u", state))
        else:
            state = state + embedded
        y = torch.cat([context, state], dim=-1)
        y = weights.linear("input_proj", y) if "input_proj.weight" in weights else y
        for i in range(config.num_blocks):
            y = y + silu(weights.linear(f"lm_head.{i}.linear", y))
        output = f"lm_head.{config.num_blocks}"
        found.append(y if config.tied_output else weights.linear(output, y))
    return torch.cat(found)


def _recurrent_in_mlx(directory: Path, given: Inputs) -> mx.array:
    written = read_head(open_source(str(directory)))
    if written.layout in ("apple", "mlx"):
        head, _, _ = load_head(directory, mx.float32)  # what generate will do
    else:  # a layout that the package does not load itself
        head = RecurrentHead(written.config)
        arrays = {n: as_mlx(x.whole(), x).astype(mx.float32) for n, x in written.tensors.items()}
        head.load_weights(list(arrays.items()))
    context, state, found = mx.array(given["context"]), None, []
    for embedded in given["embedded"]:
        state = head.advance(state, mx.array(embedded))
        found.append(head(head.read(context), state))
    return mx.concatenate(found)


# ---------------------------------------------------------------------------------------------
# Medusa (arXiv 2401.10774)


def _medusa_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    return {"hidden": _normal(generator, ROWS, config.hidden_size)}


def _medusa_in_torch(weights: Weights, given: Inputs) -> Any:
    torch, config, found = weights.torch, weights.head.config, []
    for i in range(config.heads):
        y = torch.from_numpy(given["hidden"])
        for j in range(config.blocks):
            y = y + torch.nn.functional.silu(weights.linear(f"heads.{i}.{j}.linear", y))
        found.append(y if config.shared else weights.linear(f"heads.{i}.{config.blocks}", y))
    return torch.cat(found)


def _medusa_in_mlx(directory: Path, given: Inputs) -> mx.array:
    head, _ = load_published(KINDS["medusa"], directory, mx.float32)
    return head(mx.array(given["hidden"]), head.config.heads).flatten(0, 1)


# ---------------------------------------------------------------------------------------------
# EAGLE-3 (arXiv 2503.01840): after ROWS places of a text, STEPS on states of its own. These are
# random too: what rounding does would grow from step to step, and be taken for a fault.


def _eagle3_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    ids = generator.integers(0, config.vocab_size, ROWS + STEPS)
    return {
        "captured": _normal(generator, ROWS, config.captured * config.target_hidden_size),
        "own": _normal(generator, STEPS, config.hidden_size),
        "embedded": _normal(generator, ROWS + STEPS, config.hidden_size),
        "ids": ids.astype(np.int32),
    }


def _eagle3_in_torch(weights: Weights, given: Inputs) -> Any:
    torch, config = weights.torch, weights.head.config
    embedded = torch.from_numpy(given["embedded"])
    if config.own_embedding:
        rows = [weights.rows("embed_tokens", int(i), int(i) + 1) for i in given["ids"]]
        embedded = torch.cat(rows)
    captured = torch.from_numpy(given["captured"])
    norm = lambda name, x: (
        rms_normed(torch, x, config.layer.rms_norm_eps) * weights.vector(f"{name}.weight")
    )
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
    return weights.linear("lm_head", normed) if config.own_output else normed


def _eagle3_in_mlx(directory: Path, given: Inputs) -> mx.array:
    head, _ = load_published(KINDS["eagle3"], directory, mx.float32)
    embedded = mx.array(given["embedded"])
    if head.config.own_embedding:
        embedded = head.embed_tokens(mx.array(given["ids"]))
    hidden = mx.concatenate([head.read(mx.array(given["captured"])), mx.array(given["own"])])
    caches = [KVCache() for _ in range(head.caches)]
    return head.outputs(head(embedded[None], hidden[None], "causal", caches)[0])


# ---------------------------------------------------------------------------------------------
# DFlash (arXiv 2602.06036): one block after ROWS places. What links neighbours in DFlash 2 and
# DSpark has no formula here.


def _dflash_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    size = config.layer.hidden_size
    return {
        "captured": _normal(generator, ROWS, len(config.reads) * size),
        "embedded": _normal(generator, config.block_size, size),
    }


def _dflash_in_torch(weights: Weights, given: Inputs) -> Any:
    torch, config = weights.torch, weights.head.config
    norm = lambda name, x: (
        rms_normed(torch, x, config.layer.rms_norm_eps) * weights.vector(f"{name}.weight")
    )
    context = norm("hidden_norm", weights.linear("fc", torch.from_numpy(given["captured"])))
    hidden = torch.from_numpy(given["embedded"])
    attention = Attention(weights, shape_of(torch, config.layer))
    places = torch.arange(len(context) + len(hidden))
    ahead = places - places[len(context) :, None]
    for i, sight in enumerate(config.sights):
        unseen = ahead > 0 if sight.causal else ahead > len(hidden)
        unseen = unseen | (ahead <= -sight.window) if sight.window else unseen
        read = norm(f"layers.{i}.input_layernorm", hidden)
        hidden = hidden + attention(f"layers.{i}.self_attn", read, context, unseen)
        read = norm(f"layers.{i}.post_attention_layernorm", hidden)
        hidden = hidden + mlp(weights, f"layers.{i}.mlp", read)
    return norm("norm", hidden)


def _dflash_in_mlx(directory: Path, given: Inputs) -> mx.array:
    head, _ = load_published(KINDS["dflash"], directory, mx.float32)
    texts = [TextKeys() for _ in head.layers]
    head.take_in(mx.array(given["captured"]), texts)
    memory = [x for text in texts for x in (text.keys, text.values)]
    return head(mx.array(given["embedded"])[None], [*memory, mx.array([ROWS])])[0]


def _is_dflash_1(head: Head) -> bool:
    config = head.config
    return not (config.candidates or config.markov or config.conv_taps or config.interleaved)


# ---------------------------------------------------------------------------------------------
# MTP as the dense Qwen3.5 have it: a text of ROWS tokens


def _mtp_inputs(config: Any, generator: np.random.Generator) -> Inputs:
    shape = ROWS, config.hidden_size
    return {"embedded": _normal(generator, *shape), "hidden": _normal(generator, *shape)}


def _mtp_in_torch(weights: Weights, given: Inputs) -> Any:
    torch, layer = weights.torch, weights.head.config.layer
    eps, attn = layer.input_layernorm.eps, layer.self_attn
    norm = lambda name, x: rms_normed(torch, x, eps) * (1 + weights.vector(f"{name}.weight"))
    embedded, hidden = (torch.from_numpy(given[key]) for key in ("embedded", "hidden"))
    joined = [norm("norm_embedding", embedded), norm("norm_hidden", hidden)]
    hidden = weights.linear("fc", torch.cat(joined, dim=-1))
    steps = torch.arange(0, attn.rope.dims, 2) / attn.rope.dims
    heads = attn.num_attention_heads, attn.num_key_value_heads
    shape = Shape(*heads, eps, attn.rope.base**-steps, centred=1, gated=True)
    read = norm("layer.input_layernorm", hidden)
    hidden = hidden + Attention(weights, shape)("layer.self_attn", read)
    read = norm("layer.post_attention_layernorm", hidden)
    return norm("norm", hidden + mlp(weights, "layer.mlp", read))


def _mtp_in_mlx(directory: Path, given: Inputs) -> mx.array:
    head, _ = load_published(KINDS["mtp"], directory, mx.float32)
    embedded, hidden = (mx.array(given[key])[None] for key in ("embedded", "hidden"))
    return head(embedded, head.read(hidden), "causal", [KVCache()])[0]


def _is_dense_qwen(head: Head) -> bool:
    is_qwen = "qwen3_5" in head.config.family.model_types
    return is_qwen and "layer.mlp.gate_proj.weight" in head.tensors


FORMULAS = {
    "recurrent": Formula(_recurrent_inputs, _recurrent_in_torch, _recurrent_in_mlx),
    "medusa": Formula(_medusa_inputs, _medusa_in_torch, _medusa_in_mlx),
    "eagle3": Formula(_eagle3_inputs, _eagle3_in_torch, _eagle3_in_mlx, depth=2),
    "dflash": Formula(_dflash_inputs, _dflash_in_torch, _dflash_in_mlx, 2, _is_dflash_1),
    "mtp": Formula(_mtp_inputs, _mtp_in_torch, _mtp_in_mlx, 2, _is_dense_qwen),
}


def logits(formula: Formula, weights: Weights, directory: Path, given: Inputs) -> tuple:
    """(R, D) logits of the source in PyTorch and of the result in MLX."""
    with weights.torch.inference_mode():
        theirs = formula.in_torch(weights, given).numpy()
    (ours,) = device.read(formula.in_mlx(directory, given))
    return theirs, ours

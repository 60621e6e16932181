"""What each kind of head computes: in PyTorch from the published formulas, and in MLX.

Shape letters: P places, h hidden size of the head, c columns captured of the target, D draft
vocabulary, d size of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from redrafter_mlx import device
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.drafters.kinds import KINDS
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError

from .head import Head
from .reading import read_head
from .sources import open_source
from .weights import as_mlx, as_numpy

ROWS, STEPS = 16, 4
Inputs = Mapping[str, np.ndarray]


class Weights:
    """A head's weights as PyTorch's float32, a block of rows at a time."""

    BLOCK = 2**24  # numbers

    def __init__(self, torch: ModuleType, head: Head):
        self.torch, self.head = torch, head

    def __contains__(self, name: str) -> bool:
        return name in self.head.tensors

    def linear(self, module: str, x: Any) -> Any:
        """x (..., in) times the module's weight, plus its bias if it has one."""
        count = self.head.tensors[f"{module}.weight"].shape[0]
        step = max(1, self.BLOCK // x.shape[-1])
        pieces = []
        for start in range(0, count, step):
            pieces.append(x @ self.rows(module, start, min(count, start + step)).T)
        y = self.torch.cat(pieces, dim=-1)
        return y + self.vector(f"{module}.bias") if f"{module}.bias" in self else y

    def vector(self, name: str) -> Any:
        tensor = self.head.tensors[name]
        return self._floats(tensor.whole(), tensor.dtype)

    def rows(self, module: str, start: int, stop: int) -> Any:
        """Those rows of a module's weight."""
        weight = self.head.tensors[f"{module}.weight"]
        if weight.dtype != "U32":
            return self._floats(weight.rows(start, stop), weight.dtype)
        # PyTorch knows no such packing: here mlx unpacks for both sides.
        names = (f"{module}.scales", f"{module}.biases")
        parts = [self.head.tensors[name] for name in names]
        wide = [as_mlx(p.rows(start, stop), p).astype(mx.float32) for p in parts]
        packing = self.head.packing
        packed = mx.array(weight.rows(start, stop))
        found = mx.dequantize(packed, *wide, packing.group_size, packing.bits)
        return self.torch.from_numpy(as_numpy(found).copy())

    def _floats(self, array: np.ndarray, dtype: str) -> Any:
        found = self.torch.from_numpy(array.copy())
        found = found.view(self.torch.bfloat16) if dtype == "BF16" else found
        return found.to(self.torch.float32)


@dataclass(frozen=True)
class Formula:
    """One kind of head in both worlds.

    inputs    shape, generator -> random inputs
    in_torch  weights of the source, inputs -> (R, D) logits, or what the target's output layer
              reads
    in_mlx    directory of the result, inputs -> the same
    depth     how many times as far as through a recurrent head rounding has to go
    """

    inputs: Callable[[Any, np.random.Generator], Inputs]
    in_torch: Callable[[Weights, Inputs], Any]
    in_mlx: Callable[[Path, Inputs], mx.array]
    depth: float = 1


def formula_of(head: Head) -> Formula:
    """The formula of a head's kind; UserError if there is none."""
    found = FORMULAS.get(head.kind)
    if found is None:
        raise UserError(
            f"--verify knows no formula for a head of the kind {head.kind}, only for "
            f"{', '.join(FORMULAS)}: leave it out"
        )
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
    context = torch.cat([final, *(_normed(torch, x, 1e-6) for x in fused)], dim=-1)
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
        _normed(torch, x, config.layer.rms_norm_eps) * weights.vector(f"{name}.weight")
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
    for i in range(config.layers):
        read = norm(f"layers.{i}.input_layernorm", hidden) if i else read
        hidden = hidden + _attention(weights, f"layers.{i}.self_attn", read)
        read = norm(f"layers.{i}.post_attention_layernorm", hidden)
        hidden = hidden + _mlp(weights, f"layers.{i}.mlp", read)
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
# Parts


def _normed(torch: ModuleType, x: Any, eps: float) -> Any:
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def _mlp(weights: Weights, name: str, x: Any) -> Any:
    gate = weights.torch.nn.functional.silu(weights.linear(f"{name}.gate_proj", x))
    return weights.linear(f"{name}.down_proj", gate * weights.linear(f"{name}.up_proj", x))


def _attention(weights: Weights, name: str, x: Any) -> Any:
    """Causal attention of P places (P, in) among each other."""
    torch, args = weights.torch, weights.head.config.layer
    count, shared = args.num_attention_heads, args.num_key_value_heads
    q, k, v = (
        weights.linear(f"{name}.{part}_proj", x).unflatten(-1, (heads, -1)).transpose(0, 1)
        for part, heads in (("q", count), ("k", shared), ("v", shared))
    )
    if f"{name}.q_norm.weight" in weights:
        q = _normed(torch, q, args.rms_norm_eps) * weights.vector(f"{name}.q_norm.weight")
        k = _normed(torch, k, args.rms_norm_eps) * weights.vector(f"{name}.k_norm.weight")
    angles = torch.arange(len(x))[:, None] * _frequencies(torch, args, q.shape[-1])
    q, k = (_rotated(torch, each, angles) for each in (q, k))
    k, v = (each.repeat_interleave(count // shared, dim=0) for each in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    later = torch.ones(len(x), len(x)).triu(1).bool()
    y = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v
    return weights.linear(f"{name}.o_proj", y.transpose(0, 1).flatten(1))


def _rotated(torch: ModuleType, x: Any, angles: Any) -> Any:
    """x (heads, P, d), its first half paired with the second, turned by angles (P, d / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _frequencies(torch: ModuleType, args: Any, size: int) -> Any:
    """Of rotary positions (d / 2), scaled as config.json says."""
    found = args.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        return found / scaling["factor"]
    if kind == "llama3":  # long waves are slowed down, short ones not, those between in part
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * found / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return found * (share + (1 - share) / scaling["factor"])
    if kind != "default":
        raise UserError(f"--verify knows no formula for rope scaling {kind}: leave it out")
    return found


FORMULAS = {
    "recurrent": Formula(_recurrent_inputs, _recurrent_in_torch, _recurrent_in_mlx),
    "medusa": Formula(_medusa_inputs, _medusa_in_torch, _medusa_in_mlx),
    "eagle3": Formula(_eagle3_inputs, _eagle3_in_torch, _eagle3_in_mlx, depth=2),
}


def logits(formula: Formula, weights: Weights, directory: Path, given: Inputs) -> tuple:
    """(R, D) logits of the source in PyTorch and of the result in MLX."""
    with weights.torch.inference_mode():
        theirs = formula.in_torch(weights, given).numpy()
    (ours,) = device.read(formula.in_mlx(directory, given))
    return theirs, ours

"""Parts that heads are made of, in plain PyTorch.

Shape letters: P places, h hidden size of the head, d size of an attention head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError

from .head import Head
from .safetensors import Tensor
from .weights import as_mlx, as_numpy


class Weights:
    """A head's weights as PyTorch's float32, a block of rows at a time."""

    BLOCK = 2**24  # numbers

    def __init__(self, torch: ModuleType, head: Head):
        self.torch, self.head = torch, head

    def __contains__(self, name: str) -> bool:
        return name in self.head.tensors

    def linear(self, module: str, x: Any) -> Any:
        """x (..., in) times the module's weight, plus its bias if it has one."""
        count = self._matrix(module).shape[0]
        step = max(1, self.BLOCK // x.shape[-1])
        pieces = []
        for start in range(0, count, step):
            pieces.append(x @ self.rows(module, start, min(count, start + step)).T)
        y = self.torch.cat(pieces, dim=-1)
        return y + self.vector(f"{module}.bias") if f"{module}.bias" in self else y

    def vector(self, name: str) -> Any:
        tensor = self.head.tensors[name]
        return self._floats(tensor.whole(), tensor.dtype)

    def normed(self, module: str, x: Any, eps: float, centred: float = 0) -> Any:
        """x (..., h) through an RMS norm, whose weights are what they differ from `centred` by."""
        return rms_normed(self.torch, x, eps) * (centred + self.vector(f"{module}.weight"))

    def picked(self, module: str, ids: np.ndarray) -> Any:
        """The rows of a module's weight with these ids, a few."""
        return self.torch.cat([self.rows(module, i, i + 1) for i in ids.tolist()])

    def whole(self, module: str) -> Any:
        """A module's weight."""
        return self.rows(module, 0, self._matrix(module).shape[0])

    def _matrix(self, module: str) -> Tensor:
        """A module's weight, or a matrix that is no module's."""
        return self.head.tensors[module if module in self else f"{module}.weight"]

    def rows(self, module: str, start: int, stop: int) -> Any:
        """Those rows of a module's weight, or of a matrix that is no module's."""
        weight = self._matrix(module)
        if weight.dtype != "U32":
            return self._floats(weight.rows(start, stop), weight.dtype)
        # PyTorch has no such packing, so mlx unpacks for both sides.
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


def rms_normed(torch: ModuleType, x: Any, eps: float) -> Any:
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def gated(torch: ModuleType, x: Any, gate: Any, up: Any, down: Any) -> Any:
    """An `mlp` of rows x, by its three matrices."""
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mlp(weights: Weights, name: str, x: Any) -> Any:
    gate = weights.torch.nn.functional.silu(weights.linear(f"{name}.gate_proj", x))
    return weights.linear(f"{name}.down_proj", gate * weights.linear(f"{name}.up_proj", x))


@dataclass(frozen=True)
class Shape:
    """Of an attention layer.

    heads, shared  of queries, and of keys and values
    frequencies    of rotary positions, for the first columns of a head
    centred        what is added to the weights of the norms of queries and keys
    gated          whether queries come with gates for the output
    interleaved    whether neighbouring columns are rotated together, instead of distant ones
    """

    heads: int
    shared: int
    eps: float
    frequencies: Any
    centred: float = 0
    gated: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    weights: Weights
    shape: Shape

    def __call__(self, name: str, x: Any, context: Any = None, unseen: Any = None) -> Any:
        """Attention of P places (P, in) to each other and to a context before them.

        unseen  (P, all places) what a place does not see; None: those after it
        """
        torch, shape = self.weights.torch, self.shape
        before = 0 if context is None else len(context)
        both = x if context is None else torch.cat([context, x])
        split = lambda part, y, heads: self.weights.linear(f"{name}.{part}_proj", y).unflatten(
            -1, (heads, -1)
        )
        q, gate = split("q", x, shape.heads), None
        if shape.gated:
            q, gate = q.chunk(2, dim=-1)
        k, v = (split(part, both, shape.shared) for part in "kv")
        places = torch.arange(len(both))
        q = self._turned(f"{name}.q_norm", q, places[before:])
        k = self._turned(f"{name}.k_norm", k, places)
        copies = shape.heads // shape.shared
        k, v = (y.repeat_interleave(copies, dim=1).transpose(0, 1) for y in (k, v))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if unseen is None:
            unseen = places > places[before:, None]
        y = (scores.masked_fill(unseen, -math.inf).softmax(dim=-1) @ v).transpose(0, 1)
        y = y if gate is None else y * gate.sigmoid()
        return self.weights.linear(f"{name}.o_proj", y.flatten(1))

    def _turned(self, norm: str, y: Any, places: Any) -> Any:
        """Queries or keys (P, heads, d), normed if their layer does so, rotated by their places."""
        if f"{norm}.weight" in self.weights:
            y = self.weights.normed(norm, y, self.shape.eps, self.shape.centred)
        angles = (places[:, None] * self.shape.frequencies)[:, None]
        torch, size = self.weights.torch, 2 * angles.shape[-1]
        turned = _rotated(torch, y[..., :size], angles, self.shape.interleaved)
        return torch.cat([turned, y[..., size:]], dim=-1)


def shape_of(torch: ModuleType, args: Any, interleaved: bool = False) -> Shape:
    """The shape that mlx-lm's ModelArgs describe."""
    frequencies = _frequencies(torch, args, args.head_dim)
    heads = args.num_attention_heads, args.num_key_value_heads
    return Shape(*heads, args.rms_norm_eps, frequencies, interleaved=interleaved)


def _rotated(torch: ModuleType, x: Any, angles: Any, interleaved: bool) -> Any:
    """x (..., d), its first half paired with the second, turned by angles (..., d / 2).

    interleaved  each column is paired with the next one instead
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    pairs = [a * cos - b * sin, b * cos + a * sin]
    return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)


def _frequencies(torch: ModuleType, args: Any, size: int) -> Any:
    """Of rotary positions (d / 2), scaled as config.json says."""
    found = args.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        return found / scaling["factor"]
    if kind == "llama3":  # long waves are slowed down, short ones are not, those between partly
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * found / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return found * (share + (1 - share) / scaling["factor"])
    if kind != "default":
        raise UserError(f"--verify has no formula for rope scaling {kind}: leave it out")
    return found

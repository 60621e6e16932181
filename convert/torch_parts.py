"""Parts that heads are made of, in plain PyTorch.

Shape letters: P places, h hidden size of the head, d size of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
class Rotary:
    """Rotary positions of the first columns of a head.

    frequencies  (n,) of pairs of columns
    interleaved  whether neighbouring columns are rotated together, instead of distant ones
    stretch      what these columns are multiplied by
    """

    frequencies: Any
    interleaved: bool = False
    stretch: float = 1

    def turned(self, torch: ModuleType, y: Any, places: Any) -> Any:
        """Queries or keys (P, heads, d), rotated by their places."""
        angles = (places[:, None] * self.frequencies)[:, None]
        size = 2 * angles.shape[-1]
        turned = self.stretch * _rotated(torch, y[..., :size], angles, self.interleaved)
        return torch.cat([turned, y[..., size:]], dim=-1)


@dataclass(frozen=True)
class Shape:
    """Of an attention layer.

    heads, shared  of queries, and of keys and values
    centred        what is added to the weights of the norms of queries and keys
    gated          whether queries come with gates for the output
    """

    heads: int
    shared: int
    eps: float
    rotary: Rotary
    centred: float = 0
    gated: bool = False


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
        return self.shape.rotary.turned(self.weights.torch, y, places)


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are made of a latent vector (arXiv 2405.04434, 2.1).

    heads   of queries, keys and values
    latent  size of that vector; after it comes the part of the keys that has a position
    plain   columns of a query or key without a position, the first ones
    scale   of the scores
    """

    weights: Weights
    heads: int
    latent: int
    plain: int
    eps: float
    scale: float
    rotary: Rotary

    def __call__(self, name: str, x: Any) -> Any:
        """Attention of P places (P, h) to each other."""
        torch, weights, places = self.weights.torch, self.weights, self.weights.torch.arange(len(x))
        split = lambda y: y.unflatten(-1, (self.heads, -1))
        turned = lambda y: self.rotary.turned(torch, y, places)
        if f"{name}.q_proj.weight" in weights:
            q = split(weights.linear(f"{name}.q_proj", x))
        else:
            low = weights.linear(f"{name}.q_a_proj", x)
            low = weights.normed(f"{name}.q_a_layernorm", low, self.eps)
            q = split(weights.linear(f"{name}.q_b_proj", low))
        q = torch.cat([q[..., : self.plain], turned(q[..., self.plain :])], dim=-1)
        both = weights.linear(f"{name}.kv_a_proj_with_mqa", x)
        latent = weights.normed(f"{name}.kv_a_layernorm", both[:, : self.latent], self.eps)
        kv = split(weights.linear(f"{name}.kv_b_proj", latent))
        shared = turned(both[:, None, self.latent :]).expand(-1, self.heads, -1)
        k, v = torch.cat([kv[..., : self.plain], shared], dim=-1), kv[..., self.plain :]
        scores = self.scale * q.transpose(0, 1) @ k.permute(1, 2, 0)
        scores = scores.masked_fill(places > places[:, None], -math.inf)
        y = (scores.softmax(dim=-1) @ v.transpose(0, 1)).transpose(0, 1)
        return weights.linear(f"{name}.o_proj", y.flatten(1))


def shape_of(torch: ModuleType, args: Any, interleaved: bool = False) -> Shape:
    """The shape that mlx-lm's ModelArgs describe."""
    heads = args.num_attention_heads, args.num_key_value_heads
    rotary = rotary_of(torch, args, args.head_dim, interleaved)
    return Shape(*heads, args.rms_norm_eps, rotary)


def _rotated(torch: ModuleType, x: Any, angles: Any, interleaved: bool) -> Any:
    """x (..., d), its first half paired with the second, turned by angles (..., d / 2).

    interleaved  each column is paired with the next one instead
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    pairs = [a * cos - b * sin, b * cos + a * sin]
    return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)


def rotary_of(torch: ModuleType, args: Any, size: int, interleaved: bool = False) -> Rotary:
    """Positions for `size` columns, scaled as config.json says."""
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    found = args.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if kind in YARN:
        found = _yarn(torch, found, args.rope_theta, size, scaling)
        stretch = yarn_stretch(scaling, "mscale", 1) / yarn_stretch(scaling, "mscale_all_dim", 0)
        return Rotary(found, interleaved, stretch)
    return Rotary(_scaled(found, kind, scaling), interleaved)


YARN = ("yarn", "deepseek_yarn")


def yarn_stretch(scaling: Mapping[str, Any], key: str, default: float) -> float:
    """By what YaRN makes up for longer texts (arXiv 2309.00071, 3.4), weighed by that setting."""
    return 0.1 * scaling.get(key, default) * math.log(max(scaling["factor"], 1)) + 1


def _yarn(torch: ModuleType, found: Any, base: float, size: int, scaling: Mapping[str, Any]) -> Any:
    """Frequencies that YaRN slows down: by all of its factor where a text holds few turns."""
    length = scaling.get("original_max_position_embeddings", 4096)
    place = lambda turns: size * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
    first = max(math.floor(place(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(place(scaling.get("beta_slow", 1))), size - 1)
    steps = torch.arange(len(found), dtype=torch.float32)
    slowed = ((steps - first) / max(last - first, 1e-3)).clamp(0, 1)
    return found * (1 - slowed + slowed / scaling["factor"])


def _scaled(found: Any, kind: str, scaling: Mapping[str, Any]) -> Any:
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

"""The cache of one layer: it can hold a tree of continuations and keep one path of it.

Shape letters: B batch (1), H key/value heads, S rows stored, D head size, N rows of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import create_causal_mask

from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.lineage import Lineage

BLOCK = 256
"""Rows by which the buffers grow."""

REWIND = 128
"""Rows kept behind a sliding window, so that the last tokens can be taken back."""


@dataclass(frozen=True)
class Quantization:
    """Keys and values in `bits` bits, `group_size` of them sharing a scale, from `start` tokens on.

    As in mlx-lm, the cache is quantised when a pass begins, and sliding windows never are.
    """

    bits: int
    group_size: int
    start: int


class Branches:
    """The rows of a tree that are in flight: one object, shared by the caches of all layers.

    tree      whose rows follow the committed text
    length    committed tokens before the root
    positions (N,) int32 absolute position of each row: length + depth. mlx-lm's layers read it as
              `cache.offset` and pass it to their rope modules.
    lineage   of the rows
    """

    def __init__(self, tree: TokenTree, length: int):
        self.lineage = Lineage(tree.parents)
        self._length = length
        self._depths = tree.depths
        self.positions = mx.array(length + tree.depths)
        self._masks: dict[tuple[int, int | None, bool], mx.array] = {}

    def mask(self, start: int, window: int | None, in_chunks: bool = False) -> mx.array:
        """(N, S + N) bool: what each row sees of the rows from `start` on, and of the tree.

        in_chunks  a row sees only its own chunk of `window` tokens, not the latest `window`
        """
        key = start, window, in_chunks
        if key not in self._masks:
            self._masks[key] = mx.array(self._visible(*key))
        return self._masks[key]

    def _visible(self, start: int, window: int | None, in_chunks: bool) -> np.ndarray:
        stored, rows = self._length - start, len(self.lineage)
        mask = np.ones((rows, stored + rows), bool)
        mask[:, stored:] = self.lineage.mask
        if window is not None:
            columns = np.concatenate([np.arange(-stored, 0), self._depths]) + self._length
            at = (self._depths + self._length)[:, None]
            mask &= columns // window == at // window if in_chunks else at < columns + window
        return mask


class TreeCache:
    """Keys and values of one layer in pre-allocated buffers, grown in blocks.

    A pass writes its N rows after the committed ones (`update_and_fetch`, called by the layer);
    `commit` then keeps some of them. Rejected rows are overwritten, never cleared.
    With a sliding `window`, or attention in chunks of that size (`in_chunks`), rows that no later
    token can see are dropped when the buffer grows.

    It answers what mlx-lm's layers ask of a cache: offset, make_mask, update_and_fetch,
    keys_and_values, state. It has no __len__ and no __bool__: mlx-lm tests caches for truth.
    """

    def __init__(
        self,
        window: int | None = None,
        in_chunks: bool = False,
        quantization: Quantization | None = None,
    ):
        self.window, self.in_chunks = window, in_chunks
        self._quantization = None if window else quantization
        self.keys: mx.array | tuple[mx.array, ...] | None = None
        self.values: mx.array | tuple[mx.array, ...] | None = None
        self._start = 0  # position of the first stored row
        self._length = 0  # committed tokens
        self._written = 0  # rows of the pass in flight
        self._branches: Branches | None = None

    def begin(self, rows: int, branches: Branches | None = None) -> None:
        """Make room for a pass of `rows` rows: consecutive tokens, or the rows of `branches`."""
        self._branches, self._written = branches, 0
        if self.keys is None:
            return
        if self._stored + rows > self._room:
            dropped = 0
            if self.window is not None:
                dropped = max(0, self._window_start - REWIND)
            stored = slice(dropped, self._stored)
            self._change(lambda x: _reallocate(x[..., stored, :], rows))
            self._start += dropped
        how = self._quantization
        if how and not hasattr(self, "bits") and self._length >= how.start:
            self.bits, self.group_size = how.bits, how.group_size  # mlx-lm's attention asks
            self._change(self._packed)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows `path` of the last pass, in order; the rest may be overwritten."""
        moved = next((i for i, row in enumerate(path) if row != i), len(path))
        if moved < len(path) and self.keys is not None:
            base = self._stored
            rows = mx.array([base + row for row in path[moved:]])
            kept = slice(base + moved, base + len(path))
            for x in self._buffers:
                x[..., kept, :] = mx.take(x, rows, axis=2)
        self._length += len(path)
        self._branches, self._written = None, 0

    def restore(self, keys: Any, values: Any, start: int, length: int) -> None:
        """Hold these arrays (B, H, S, D) of the tokens from `start` to `length`."""
        self.keys, self.values, self._start, self._length = keys, values, start, length

    def frozen(self) -> TreeCache | None:
        """The cache as it is now, for a later `fork`; None if it can always be forked here."""
        if self.window is None:
            return None
        held = self.fork(self._length)
        if self.keys is not None:
            held._change(lambda x: mx.contiguous(x[..., self._window_start :, :]))
            held._start += self._window_start
        return held

    def fork(self, length: int) -> TreeCache:
        """A copy with the first `length` tokens; this one must still hold all they left."""
        other = TreeCache(self.window, self.in_chunks, self._quantization)
        if self.keys is not None:
            other.keys, other.values = self.keys, self.values
            other._change(lambda x: x[..., : length - self._start, :])
            if hasattr(self, "bits"):
                other.bits, other.group_size = self.bits, self.group_size
        other._start, other._length = self._start, length
        return other

    def restorable(self, length: int) -> int:
        """The longest text of at most `length` tokens that `rewind` could leave; -1: none."""
        gone = self._start > 0 and length - self.window + 1 < self._start
        return -1 if gone else min(length, self._length)

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; if it cannot, False and nothing is changed."""
        if self.restorable(length) < 0:
            return False
        self._length = length
        return True

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._length

    @property
    def _stored(self) -> int:
        return self._length - self._start

    @property
    def _window_start(self) -> int:
        """The first stored row that a later token can see."""
        return max(0, self._stored - self.window + 1)

    @property
    def offset(self) -> int | mx.array:
        """Position of the pass's first row, or (N,) the position of each row of a tree."""
        if self._branches is not None:
            return self._branches.positions
        return self._length + self._written

    @property
    def start_position(self) -> int:
        """Position of the first stored row; mlx-lm's attention in chunks asks for it."""
        return self._start

    def maybe_trim_front(self) -> None:
        """mlx-lm's chunked cache drops rows here; ours does so in `begin`."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write a pass's rows (B, H, N, D) and return all stored ones (B, H, S + N, D)."""
        count = keys.shape[2]
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
            self._change(lambda x: _reallocate(x, count))
        first = self._stored + self._written
        self._written += count
        new = (keys, values)
        if hasattr(self, "bits"):
            new = tree_map(self._packed, new)
        for x, rows in zip(self._buffers, _leaf_arrays(new), strict=True):
            x[..., first : first + count, :] = rows
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is stored, the pass in flight included: two arrays (B, H, S, D).

        If quantised, two tuples as `mx.quantize` returns them.
        """
        end = self._stored + self._written
        return tree_map(lambda x: x[..., :end, :], (self.keys, self.values))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """mlx-lm's question before each pass; None, "causal", or (N, S + N) bool."""
        window = window_size or self.window
        if self.window is not None and window > self.window:
            raise ValueError(
                f"a mask for {window} rows over a cache of {self.window}: in mlx-lm a prompt's "
                "chunk sees further than a single step, so no tree can equal both"
            )
        if self._branches is not None:
            return self._branches.mask(self._start, window, self.in_chunks)
        if window is not None and self._stored + N > window:
            return create_causal_mask(N, self._stored, window_size=window)
        if N == 1:
            return None
        return create_causal_mask(N, self._stored) if return_array else "causal"

    def _packed(self, x: mx.array) -> tuple[mx.array, ...]:
        return mx.quantize(x, group_size=self.group_size, bits=self.bits)

    def _change(self, each: Callable[[mx.array], Any]) -> None:
        self.keys, self.values = tree_map(each, (self.keys, self.values))

    @property
    def _buffers(self) -> list[mx.array]:
        return _leaf_arrays((self.keys, self.values))

    @property
    def _room(self) -> int:
        return self._buffers[0].shape[2]

    @property
    def state(self) -> tuple[Any, Any]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else sum(x.nbytes for x in self._buffers)


def _leaf_arrays(tree: Any) -> list[mx.array]:
    return [x for _, x in tree_flatten(tree)]


def _reallocate(rows: mx.array, more: int) -> mx.array:
    """A buffer (B, H, capacity, D) that starts with `rows` and has room for `more`."""
    room = -(-(rows.shape[2] + more) // BLOCK) * BLOCK - rows.shape[2]
    return mx.concatenate([rows, mx.zeros((*rows.shape[:2], room, rows.shape[3]), rows.dtype)], 2)

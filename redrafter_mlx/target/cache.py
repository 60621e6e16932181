"""A KV cache that can hold a tree of continuations and keep one path of it.

Shape letters: B batch (1), H key/value heads, S rows stored, D head size, N rows of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask

from redrafter_mlx.tree import TokenTree

BLOCK = 256
"""Rows by which the buffers grow."""

REWIND = 128
"""Rows kept behind a sliding window, so that the last tokens can be taken back."""


class Branches:
    """The rows of a tree that are in flight: one object, shared by the caches of all layers.

    tree      whose rows follow the committed text
    length    committed tokens before the root
    positions (N,) int32 absolute position of each row: length + depth. mlx-lm's layers read it as
              `cache.offset` and hand it to their rope.
    """

    def __init__(self, tree: TokenTree, length: int):
        self._tree = tree
        self._length = length
        self._depths = tree.depths
        self.positions = mx.array(length + tree.depths)
        self._masks: dict[tuple[int, int | None], mx.array] = {}

    def mask(self, start: int, window: int | None) -> mx.array:
        """(N, S + N) bool: what each row sees of the rows from `start` on, and of the tree."""
        if (start, window) not in self._masks:
            self._masks[start, window] = mx.array(self._visible(start, window))
        return self._masks[start, window]

    def _visible(self, start: int, window: int | None) -> np.ndarray:
        stored = self._length - start
        mask = np.ones((len(self._tree), stored + len(self._tree)), bool)
        mask[:, stored:] = self._tree.mask()
        if window is not None:
            columns = np.concatenate([np.arange(-stored, 0), self._depths])
            mask &= self._depths[:, None] < columns + window
        return mask


class TreeCache:
    """Keys and values of one layer in pre-allocated buffers, grown in blocks.

    A pass writes its N rows after the committed ones (`update_and_fetch`, called by the layer);
    `commit` then keeps some of them. Rejected rows are overwritten, never cleared.
    With a sliding `window`, rows that no later token can see are dropped when the buffer grows.

    It answers what mlx-lm's layers ask of a cache: offset, make_mask, update_and_fetch,
    keys_and_values, state. It has no __len__ and no __bool__: mlx-lm tests caches for truth.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._start = 0  # position of the first stored row
        self._length = 0  # committed tokens
        self._written = 0  # rows of the pass in flight
        self._branches: Branches | None = None

    def begin(self, rows: int, branches: Branches | None = None) -> None:
        """Make room for a pass of `rows` rows: consecutive tokens, or the rows of `branches`."""
        self._branches, self._written = branches, 0
        if self.keys is not None and self._stored + rows > self.keys.shape[2]:
            dropped = 0
            if self.window is not None:
                dropped = max(0, self._stored - self.window + 1 - REWIND)
            self.keys, self.values = (
                _reallocate(x[..., dropped : self._stored, :], rows)
                for x in (self.keys, self.values)
            )
            self._start += dropped

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows `path` of the last pass, in order; the rest may be overwritten."""
        moved = next((i for i, row in enumerate(path) if row != i), len(path))
        if moved < len(path) and self.keys is not None:
            base = self._stored
            rows = mx.array([base + row for row in path[moved:]])
            kept = slice(base + moved, base + len(path))
            self.keys[..., kept, :] = mx.take(self.keys, rows, axis=2)
            self.values[..., kept, :] = mx.take(self.values, rows, axis=2)
        self._length += len(path)
        self._branches, self._written = None, 0

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; False, and nothing is done, if it cannot."""
        if self._start > 0 and length - self.window + 1 < self._start:
            return False
        self._length = length
        return True

    @property
    def _stored(self) -> int:
        return self._length - self._start

    @property
    def offset(self) -> int | mx.array:
        """Position of the pass's first row, or (N,) the position of each row of a tree."""
        if self._branches is not None:
            return self._branches.positions
        return self._length + self._written

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write a pass's rows (B, H, N, D) and return all stored ones (B, H, S + N, D)."""
        if self.keys is None:
            self.keys, self.values = (
                _reallocate(keys[..., :0, :], keys.shape[2]),
                _reallocate(values[..., :0, :], keys.shape[2]),
            )
        first = self._stored + self._written
        self._written += keys.shape[2]
        end = first + keys.shape[2]
        self.keys[..., first:end, :] = keys
        self.values[..., first:end, :] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is stored, the pass in flight included: two arrays (B, H, S, D)."""
        end = self._stored + self._written
        return self.keys[..., :end, :], self.values[..., :end, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """mlx-lm's question before each pass; None, "causal", or (N, S + N) bool."""
        window = window_size or self.window
        if self.window is not None and window > self.window:
            raise ValueError(
                f"a mask for {window} rows over a cache of {self.window}: in mlx-lm a chunk sees "
                "further than a step, so no tree can equal both"
            )
        if self._branches is not None:
            return self._branches.mask(self._start, window)
        if window is not None and self._stored + N > window:
            return create_causal_mask(N, self._stored, window_size=window)
        if N == 1:
            return None
        return create_causal_mask(N, self._stored) if return_array else "causal"

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class LayerCaches:
    """The caches of all layers of one text.

    layers  TreeCaches, or mlx-lm's own caches: those only take one token after the other, and
            there is nothing to begin or to commit
    """

    def __init__(self, layers: Sequence[Any]):
        self.layers = list(layers)
        self._branching = [cache for cache in layers if isinstance(cache, TreeCache)]
        self._length = 0

    def begin(self, rows: int, branches: Branches | None = None) -> None:
        """A pass of `rows` rows follows: consecutive tokens, or the rows of `branches`."""
        for cache in self._branching:
            cache.begin(rows, branches)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows `path` of the last pass, in order."""
        for cache in self._branching:
            cache.commit(path)
        before, self._length = self._length, self._length + len(path)
        if before // BLOCK < self._length // BLOCK:
            mx.clear_cache()  # buffers of sizes that will not come again

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; False if a layer cannot.

        After False the caches are of no further use.
        """
        self._length = length
        return all(cache.rewind(length) for cache in self._branching)

    @property
    def state(self) -> list[Any]:
        """All arrays, for evaluation."""
        return [cache.state for cache in self.layers]


def _reallocate(rows: mx.array, more: int) -> mx.array:
    """A buffer (B, H, capacity, D) that starts with `rows` and has room for `more`."""
    room = -(-(rows.shape[2] + more) // BLOCK) * BLOCK - rows.shape[2]
    return mx.concatenate([rows, mx.zeros((*rows.shape[:2], room, rows.shape[3]), rows.dtype)], 2)

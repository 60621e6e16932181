"""Who descends from whom among the rows of a pass.

Shape letters: N rows, K size of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np


@dataclass(frozen=True, eq=False)
class Lineage:
    """The ancestors of N rows: each row continues an earlier one, the first the committed text.

    parents  (N,) the row that each continues; -1 for the first

    Layers that keep a state need it, since a row may only read what its ancestors have left.
    """

    parents: np.ndarray

    @classmethod
    @lru_cache(maxsize=64)
    def chain(cls, rows: int) -> Lineage:
        """Consecutive tokens."""
        return cls(np.arange(-1, rows - 1))

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def is_chain(self) -> bool:
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    @cached_property
    def mask(self) -> np.ndarray:
        """(N, N) bool: whether j is i itself or one of its ancestors."""
        mask = np.eye(len(self), dtype=bool)
        for i in range(1, len(self)):
            mask[i] |= mask[self.parents[i]]
        return mask

    @cached_property
    def ancestors(self) -> mx.array:
        """The mask on the device, as float32: its product with rows sums them along paths."""
        return mx.array(self.mask.astype(np.float32))

    @cached_property
    def visible(self) -> mx.array:
        """The mask on the device."""
        return mx.array(self.mask)

    @cached_property
    def depths(self) -> mx.array:
        """(N,) distance from the first row."""
        return mx.array(self._depths.astype(np.int32))

    @cached_property
    def levels(self) -> list[slice]:
        """Rows of each depth, counted in the order of `order`."""
        ends = np.cumsum(np.bincount(self._depths)).tolist()
        return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def order(self) -> mx.array | None:
        """(N,) rows by depth; None if they are in that order already."""
        order = self._order
        return None if (order == np.arange(len(self))).all() else mx.array(order)

    @cached_property
    def inverse(self) -> mx.array:
        """(N,) places of the rows in `order`."""
        return mx.array(self._places)

    @cached_property
    def continued(self) -> list[mx.array | None]:
        """By level: the places in the level before that its rows continue; None: 0, 1, 2, ..."""
        found: list[mx.array | None] = [None]
        for level, before in zip(self.levels[1:], self.levels, strict=False):
            places = self._places[self.parents[self._order[level]]] - before.start
            is_same = places.tolist() == list(range(before.stop - before.start))
            found.append(None if is_same else mx.array(places))
        return found

    def place(self, row: int) -> tuple[int, int]:
        """A row's level, and its place in that level."""
        level = int(self._depths[row])
        return level, int(self._places[row]) - self.levels[level].start

    def windows(self, size: int) -> mx.array:
        """(N, K) each row and its ancestors, as indices into [K - 1 rows of the text, N rows]."""
        if size not in self._windows:
            self._windows[size] = mx.array(self._rows_of_windows(size))
        return self._windows[size]

    def _rows_of_windows(self, size: int) -> np.ndarray:
        found = np.zeros((len(self), size), np.int32)
        for row, parent in enumerate(self.parents):
            before = np.arange(size - 1) if parent < 0 else found[parent, 1:]
            found[row] = [*before, size - 1 + row]
        return found

    @cached_property
    def _windows(self) -> dict[int, mx.array]:
        return {}

    @cached_property
    def _depths(self) -> np.ndarray:
        return self.mask.sum(axis=1) - 1

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self._depths, kind="stable")

    @cached_property
    def _places(self) -> np.ndarray:
        places = np.empty(len(self), int)
        places[self._order] = np.arange(len(self))
        return places

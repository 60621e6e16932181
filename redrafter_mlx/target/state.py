"""The memory of recurrent layers, able to branch: it stands in for mlx-lm's ArraysCache.

Such a layer reads its slots and stores in them their values after all rows of the pass. That is
right for a prompt and for a single row. Where rows may be rejected, the layer's convolutions and
recurrences (hooks.py) run along the tree's paths and leave a tape here, from which the value of
each slot after any row follows. Committing a path takes that of its last row. No weight is read
again for it, and nothing of a rejected row remains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from redrafter_mlx.target.lineage import Lineage

_lineage: ContextVar[Lineage | None] = ContextVar("lineage", default=None)
_reading: ContextVar[StateCache | None] = ContextVar("reading", default=None)


def in_flight() -> Lineage | None:
    """The lineage of the pass that is running; None if none is, or if all its rows will be kept."""
    return _lineage.get()


def reading() -> StateCache:
    """The cache of the recurrent layer that is running: the one that was read last."""
    return _reading.get()


@contextmanager
def forward_pass(lineage: Lineage | None) -> Iterator[None]:
    """Within it, a pass over the rows of `lineage` is running."""
    token = _lineage.set(lineage)
    try:
        yield
    finally:
        _lineage.reset(token)
        _reading.set(None)


class StateCache(ArraysCache):
    """What one recurrent layer keeps of a text: an array in each slot.

    A slot holds either the state of a recurrence, recognised because a taped recurrence returned
    it, or a window of the latest rows. Windows belong to convolutions in the order in which these
    ran.

    lineage     of the rows of the pass in flight; None if all of them will be kept
    steps_back  commits that can be taken back, whose states are kept; arrays are never changed, so
                this costs memory only
    """

    def __init__(self, slots: int, steps_back: int = 0):
        super().__init__(slots)
        self._kept: list[mx.array | None] = [None] * slots
        self._length = 0
        self._past: deque[tuple[int, list]] = deque([(0, self._kept)], maxlen=steps_back + 1)
        self.begin(0)

    def begin(self, rows: int, lineage: Lineage | None = None) -> None:
        """A pass of `rows` rows follows, all of which will be kept if no lineage is given."""
        self._rows, self.lineage = rows, lineage
        self._given: dict[int, mx.array] = {}
        self._states: list[tuple[mx.array, Callable[[int], mx.array]]] = []
        self._steps: list[mx.array] = []
        self._windows: list[tuple[mx.array, int, int]] = []

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows `path` of the last pass, in order."""
        self._kept = list(self._kept)
        if len(path) == self._rows and (self.lineage is None or self.lineage.is_chain):
            for slot, value in self._given.items():
                self._kept[slot] = value
        elif path:
            self._fold(list(path))
        self._length += len(path)
        self._past.append((self._length, self._kept))
        self.begin(0)

    def _fold(self, path: list[int]) -> None:
        windows = iter(self._windows)
        for slot, value in sorted(self._given.items()):
            after = next((after for new, after in self._states if new is value), None)
            if after is None:
                window = next(windows, None)
                if window is None:
                    raise _unknown(slot)
                self._kept[slot] = _latest(*window, path)
            else:
                self._kept[slot] = after(path[-1])
        if next(windows, None) is not None:
            raise _unknown(None)

    def keep_state(self, new: mx.array, after: Callable[[int], mx.array]) -> mx.array:
        """Tape a recurrence: its `new` state, which the layer gets, and the state after any row."""
        self._states.append((new, after))
        return new

    def keep_step(
        self, step: Callable[[mx.array | None], tuple[mx.array, mx.array]], state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Run and tape the next row's step of a recurrence that its layer runs row by row.

        step   state before -> (y, state after)
        state  before the pass, or after the row that the layer ran last
        """
        row = len(self._steps)
        parent = int(self.lineage.parents[row])
        y, new = step(state if parent < 0 else self._steps[parent])
        self._steps.append(new)
        if row == len(self.lineage) - 1:
            states = self._steps
            self.keep_state(new, lambda row: states[row])
        return y, new

    def keep_window(self, rows: mx.array, size: int, axis: int = 1) -> None:
        """Tape a convolution over `size` rows: those before the pass, then those of the pass."""
        self._windows.append((rows, size - 1, axis))

    def restore(self, arrays: Sequence[mx.array | None]) -> None:
        """Hold these arrays."""
        self._kept = list(arrays)

    def restart(self, rows: Sequence[int]) -> None:
        """Other texts begin in these rows of a batch: their states become zeros."""
        if rows and self._kept[0] is not None:
            left = np.ones(len(self._kept[0]), bool)
            left[list(rows)] = False
            kept = mx.array(left)
            self._kept = [mx.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in self._kept]

    def frozen(self) -> StateCache:
        """The cache as it is now, for a later `fork`."""
        return self._holding(self._length, self._kept)

    def fork(self, length: int) -> StateCache:
        """A copy with the first `length` tokens, whose state must still be kept."""
        return self._holding(length, next(kept for held, kept in self._past if held == length))

    def _holding(self, length: int, kept: list) -> StateCache:
        other = StateCache(len(kept), self._past.maxlen - 1)
        other.restore(kept)
        other.begin_at(length)
        return other

    def begin_at(self, length: int) -> None:
        """The arrays held are the state after `length` tokens."""
        self._length = length
        self._past.clear()
        self._past.append((length, self._kept))

    def restorable(self, length: int) -> int:
        """The longest text of at most `length` tokens that `rewind` could leave; -1: none."""
        return max((held for held, _ in self._past if held <= length), default=-1)

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; False if their state was not kept."""
        while self._past and self._past[-1][0] > length:
            self._past.pop()
        if not self._past or self._past[-1][0] != length:
            return False
        self._length, self._kept = self._past[-1]
        return True

    def __getitem__(self, slot: int) -> mx.array | None:
        _reading.set(self)
        return self._given.get(slot, self._kept[slot])

    def __setitem__(self, slot: int, value: mx.array) -> None:
        self._given[slot] = value

    @property
    def state(self) -> list[Any]:
        return self._kept

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._kept if value is not None)


def _latest(rows: mx.array, kept: int, axis: int, path: list[int]) -> mx.array:
    """The last `kept` of the rows before the pass and those of the path."""
    latest = [*range(kept), *(kept + row for row in path)][len(path) :]
    return mx.take(rows, mx.array(latest), axis=axis)


def _unknown(slot: int | None) -> ValueError:
    what = "a convolution that no slot belongs to" if slot is None else f"slot {slot}"
    return ValueError(f"a recurrent layer keeps something that cannot branch: {what}")

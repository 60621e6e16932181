"""RWKV-7: a shift by one token, and a generalised delta rule whose steps run level by level."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.recurrence import by_levels
from redrafter_mlx.target.state import reading


def _shift(stock, self, x, state=None):
    """For each row of x (1, N, D) the one before it; state (1, 1, D) comes before the first."""
    cache = reading()
    before = mx.zeros((1, 1, x.shape[-1]), x.dtype) if state is None else state
    rows = mx.concatenate([before, x], axis=1)
    cache.keep_window(rows, 2)
    return rows[:, cache.lineage.windows(2)[:, 0]]


def _wkv7(stock, self, r, w, k, v, a, b, state):
    """r, w, k, v, a, b (1, N, H, D), state (1, H, D, D)."""
    cache = reading()
    step = lambda *rows_and_state: stock(self, *rows_and_state)
    y, after = by_levels(step, [r, w, k, v, a, b], state, cache.lineage)
    return y, cache.keep_state(after(r.shape[1] - 1), after)


FUNCTIONS = {}
METHODS = {
    "mlx_lm.models.rwkv7.TokenShift": {"__call__": (_shift, ("self", "x", "state"))},
    "mlx_lm.models.rwkv7.Rwkv7TimeMixing": {
        "_wkv7": (_wkv7, ("self", "r", "w", "k", "v", "a", "b", "state"))
    },
}

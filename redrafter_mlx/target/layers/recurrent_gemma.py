"""RecurrentGemma: a convolution with its own cache, and the RG-LRU (arXiv 2402.19427)."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.recurrence import decayed_rows
from redrafter_mlx.target.state import reading


def _convolution(stock, self, x, cache=None):
    """x (1, N, C) after cache (1, K - 1, C); the result, and the latest rows."""
    held, size = reading(), self.weight.shape[1]
    before = mx.zeros((1, size - 1, x.shape[-1]), x.dtype) if cache is None else cache
    rows = mx.concatenate([before, x], axis=1)
    held.keep_window(rows, size)
    windows = rows[0][held.lineage.windows(size)]
    y = mx.conv_general(windows, self.weight, groups=len(self.weight)) + self.bias
    return y.swapaxes(0, 1), rows[:, 1 - size :]


def _rnn_scan(stock, x, a, h0=None):
    """x, a (1, N, D), h0 (1, D)."""
    cache = reading()
    state = mx.zeros(x.shape[-1], x.dtype) if h0 is None else h0[0]
    y, last = decayed_rows(x[0], a[0], state, cache.lineage)
    after = lambda row: last(row)[None]
    return y[None], cache.keep_state(after(x.shape[1] - 1), after)


FUNCTIONS = {"mlx_lm.models.recurrent_gemma": {"rnn_scan": (_rnn_scan, ("x", "a", "h0"))}}
METHODS = {
    "mlx_lm.models.recurrent_gemma.Conv1d": {"__call__": (_convolution, ("self", "x", "cache"))}
}

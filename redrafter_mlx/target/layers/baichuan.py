"""Baichuan-M1: attention whose keys and values are each mixed with the one before."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.state import reading


def _mix(stock, self, u, weights, state=None):
    """u (1, H, N, D) after state (1, H, 1, D)."""
    cache = reading()
    before = mx.zeros((1, u.shape[1], 1, u.shape[3]), u.dtype) if state is None else state
    rows = mx.concatenate([before, u], axis=2)
    cache.keep_window(rows, 2, axis=2)
    weights = weights.reshape(1, u.shape[1], 2, 1, 1)
    previous = rows[:, :, cache.lineage.windows(2)[:, 0]]
    return previous * weights[:, :, 0] + u * weights[:, :, 1]


FUNCTIONS = {}
METHODS = {
    "mlx_lm.models.baichuan_m1.Attention": {
        "_custom_convolution": (_mix, ("self", "u", "weights", "state"))
    }
}

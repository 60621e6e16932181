"""Lightning attention (Bailing / Ling, Ring): linear attention with a decay for each head."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.recurrence import decayed_sum
from redrafter_mlx.target.state import reading


def _recurrent_gla(stock, q, k, v, g, scale, h=None, mask=None, chunk=128):
    """q, k (1, H, N, K), v (1, H, N, V), g (H,), h (1, H, K, V)."""
    cache, rows = reading(), q.shape[2]
    if h is None:
        h = mx.zeros((1, q.shape[1], k.shape[-1], v.shape[-1]), mx.float32)
    log_decay = mx.broadcast_to(g.astype(mx.float32), (rows, g.size))
    reads, keys, values, state = (x[0].astype(mx.float32) for x in (q, k, v, h.swapaxes(2, 3)))
    y, last = decayed_sum(reads * scale, keys, values, log_decay, state, cache.lineage)
    after = lambda row: last(row).swapaxes(1, 2)[None].astype(h.dtype)
    return y[None].astype(q.dtype), cache.keep_state(after(rows - 1), after)


_GLA = {"recurrent_gla": (_recurrent_gla, ("q", "k", "v", "g", "scale", "h"))}
FUNCTIONS = {
    "mlx_lm.models.bailing_hybrid": _GLA,
    "mlx_lm.models.bailing_moe_linear": _GLA,
}
METHODS = {}

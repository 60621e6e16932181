"""LongCat Flash with n-gram embeddings: an embedding of each token and those before it."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.state import reading


def _embed(stock, self, input_ids, cache=None):
    """input_ids (1, N) after the ids in cache[0] (1, at most n - 1), to (1, N, E)."""
    before = cache[0]
    ids = input_ids.astype(mx.int64)
    if before is not None:
        ids = mx.concatenate([before, ids], axis=1)
    missing = self.n - 1 + input_ids.shape[1] - ids.shape[1]
    rows = mx.pad(ids, [(0, 0), (missing, 0)])  # no ids before the text: zeros
    held = reading()
    held.keep_window(rows, self.n)
    cache[0] = rows[:, -(self.n - 1) :]
    return stock(self, rows[0][held.lineage.windows(self.n)], None)[None, :, -1]


FUNCTIONS = {}
METHODS = {
    "mlx_lm.models.longcat_flash_ngram.NgramEmbedding": {
        "__call__": (_embed, ("self", "input_ids", "cache"))
    }
}

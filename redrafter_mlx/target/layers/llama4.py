"""Llama 4: attention in chunks, and a temperature by position; the model counts both itself."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.layers.positions import Counting


class _Tempered(Counting):
    """The cache of a layer whose queries are scaled by position: (N, 1) factors of the rows."""

    def __init__(self, cache, attention):
        super().__init__(cache)
        steps = mx.log(mx.floor((cache.offset + 1) / attention.floor_scale) + 1.0)
        self.factors = (steps * attention.attn_scale + 1.0)[:, None]


def _model(stock, self, inputs, cache=None):
    if not isinstance(cache[0].offset, mx.array):
        return stock(self, inputs, cache)
    return stock(self, inputs, [Counting(each) for each in cache])


def _layer(stock, self, x, mask=None, cache=None):
    if not isinstance(cache, Counting):
        return stock(self, x, mask, cache)
    attention, cache = self.self_attn, cache.cache
    if cache.in_chunks:
        mask = cache.make_mask(x.shape[1])
    if attention.use_rope or not attention.attn_temperature_tuning:
        return stock(self, x, mask, cache)
    attention.attn_temperature_tuning = False
    try:
        return stock(self, x, mask, _Tempered(cache, attention))
    finally:
        attention.attn_temperature_tuning = True


def _attend(stock, queries, keys, values, cache, *args, **kwargs):
    if isinstance(cache, _Tempered):
        queries = (queries * cache.factors).astype(queries.dtype)
    return stock(queries, keys, values, cache, *args, **kwargs)


FUNCTIONS = {
    "mlx_lm.models.llama4": {
        "scaled_dot_product_attention": (_attend, ("queries", "keys", "values", "cache"))
    }
}
METHODS = {
    "mlx_lm.models.llama4.LlamaModel": {"__call__": (_model, ("self", "inputs", "cache"))},
    "mlx_lm.models.llama4.TransformerBlock": {"__call__": (_layer, ("self", "x", "mask", "cache"))},
}

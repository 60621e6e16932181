"""Positions that a model counts itself: learned ones (GPT-2), and rotations by a function."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx.target.rope import rotate_rows


class Counting:
    """A tree's cache for code that counts rows from the first one; all else is the cache's own."""

    def __init__(self, cache):
        self.cache, self.offset = cache, cache.length

    def __getattr__(self, name: str):
        return getattr(self.cache, name)


def _learned(stock, self, inputs, cache=None):
    """The model counts positions from the first cache's offset; here the rows' own are embedded."""
    if not isinstance(cache[0].offset, mx.array):
        return stock(self, inputs, cache)
    embed, positions = self.wpe, cache[0].offset
    self.wpe = lambda _: embed(positions)
    try:
        return stock(self, inputs, [Counting(cache[0]), *cache[1:]])
    finally:
        self.wpe = embed


def _rotate(stock, x, offset, *args, **kwargs):
    return rotate_rows(lambda x, offset: stock(x, offset, *args, **kwargs), x, offset)


def _rotate_method(stock, self, x, offset):
    return rotate_rows(lambda x, offset: stock(self, x, offset), x, offset)


FUNCTIONS = {"mlx_lm.models.nanochat": {"apply_rotary_emb": (_rotate, ("x", "offset"))}}
_TAKES = ("self", "inputs", "cache")
METHODS = {
    "mlx_lm.models.talkie.Attention": {"_rope": (_rotate_method, ("self", "x", "offset"))},
    "mlx_lm.models.gpt2.GPT2Model": {"__call__": (_learned, _TAKES)},
    "mlx_lm.models.gpt_bigcode.GPTBigCodeModel": {"__call__": (_learned, _TAKES)},
}

"""mlx-lm's caches turned into ours and back, so that its prompt caches can be continued.

Shape letters: B batch (1), H heads, S rows stored, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from redrafter_mlx.errors import UserError
from redrafter_mlx.target.cache import TreeCache
from redrafter_mlx.target.caches import CacheGroup, LayerCaches
from redrafter_mlx.target.state import StateCache


def length_of(caches: Sequence[Any]) -> int:
    """Tokens that mlx-lm's caches hold; 0 if none counts them (recurrent layers alone)."""
    lengths = [length_of(c.caches) if isinstance(c, CacheList) else getattr(c, "offset", 0)
               for c in caches]  # fmt: skip
    return max(lengths, default=0)


def take_over(ours: LayerCaches, theirs: Sequence[Any]) -> None:
    """Fill empty caches with what mlx-lm's hold.

    Raises UserError, naming the layer, if they are of another model or of several texts.
    """
    if len(ours.layers) != len(theirs):
        raise UserError(
            f"the prompt cache has {len(theirs)} layers, the model {len(ours.layers)}: it was made "
            "with another model"
        )
    for layer, pair in enumerate(zip(ours.layers, theirs, strict=True)):
        try:
            _take_over(*pair)
        except _Unlike as error:
            raise UserError(f"the prompt cache does not fit: layer {layer} {error}") from None
    ours.begin_at(length_of(theirs))


class _Unlike(Exception):
    pass


def _take_over(mine: Any, given: Any) -> None:
    if isinstance(mine, CacheGroup) and isinstance(given, CacheList):
        for pair in zip(mine.members, given.caches, strict=True):
            _take_over(*pair)
    elif isinstance(mine, StateCache) and isinstance(given, ArraysCache):
        _check([x for x in given.cache if x is not None])
        mine.restore(given.cache)
    elif isinstance(mine, TreeCache) and type(given) in _STORED:
        keys, values, start = _STORED[type(given)](given)
        if keys is not None:
            _check([x for _, x in tree_flatten((keys, values))])
            mine.restore(keys, values, start, given.offset)
            if isinstance(given, QuantizedKVCache):
                mine.bits, mine.group_size = given.bits, given.group_size
    else:
        raise _Unlike(f"is a {type(given).__name__} there")


def _check(arrays: Sequence[mx.array]) -> None:
    if any(len(x) != 1 for x in arrays):
        raise _Unlike("holds several texts")


def _plain(cache: KVCache) -> tuple:
    if cache.keys is None:
        return None, None, 0
    return (*tree_map(lambda x: x[..., : cache.offset, :], (cache.keys, cache.values)), 0)


def _rotating(cache: RotatingKVCache) -> tuple:
    if cache.keep:
        raise _Unlike("keeps the first tokens and forgets later ones (max_kv_size)")
    if cache.keys is None:
        return None, None, 0
    keys, values = (cache._temporal_order(x) for x in (cache.keys, cache.values))
    stored = min(keys.shape[2], cache.offset)
    return keys[..., -stored:, :], values[..., -stored:, :], cache.offset - stored


def _chunked(cache: ChunkedKVCache) -> tuple:
    if cache.keys is None:
        return None, None, 0
    return (*cache.keys_and_values(), cache.start_position)


_STORED = {
    KVCache: _plain,
    QuantizedKVCache: _plain,
    RotatingKVCache: _rotating,
    ChunkedKVCache: _chunked,
}


def hand_back(ours: LayerCaches, theirs: list[Any]) -> None:
    """Put what our caches hold into mlx-lm's, in place."""
    for layer, (mine, given) in enumerate(zip(ours.layers, theirs, strict=True)):
        theirs[layer] = _hand_back(mine, given)


def _hand_back(mine: Any, given: Any) -> Any:
    if isinstance(mine, CacheGroup):
        given.caches = tuple(map(_hand_back, mine.members, given.caches))
    elif isinstance(mine, StateCache):
        given.cache = list(mine.state)
    elif mine.keys is not None:
        if hasattr(mine, "bits") and not isinstance(given, QuantizedKVCache):
            given = QuantizedKVCache(mine.group_size, mine.bits)
        given.keys, given.values = mine.keys_and_values()
        given.offset = mine.length
        if isinstance(given, ChunkedKVCache):
            given.start_position = mine.start_position
        elif isinstance(given, RotatingKVCache):
            latest = slice(-given.max_size, None)
            given.keys, given.values = (x[..., latest, :] for x in (given.keys, given.values))
            given._idx = given.keys.shape[2]
    return given

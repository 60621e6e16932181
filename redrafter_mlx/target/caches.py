"""The caches of all layers for one text: they grow, branch, go back and are forked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from redrafter_mlx.machine import device
from redrafter_mlx.target.cache import BLOCK, Branches, Quantization, TreeCache
from redrafter_mlx.target.lineage import Lineage
from redrafter_mlx.target.state import StateCache


class CacheGroup:
    """Several caches of one layer; stands in for mlx-lm's CacheList."""

    def __init__(self, members: Sequence[TreeCache | StateCache | CacheGroup]):
        self.members = list(members)

    def __getitem__(self, place: int) -> Any:
        return self.members[place]

    @property
    def state(self) -> list[Any]:
        return [member.state for member in self.members]


class LayerCaches:
    """The caches of all layers of one text.

    branching     our caches, those in groups one by one
    length        committed tokens
    layers        our caches, or mlx-lm's own, which only take one token after the other
    quantization  of keys and values
    lineage       of the rows of the pass in flight, if some may be rejected
    """

    def __init__(self, layers: Sequence[Any], quantization: Quantization | None = None):
        self.layers = list(layers)
        self.quantization = quantization
        self.lineage: Lineage | None = None
        self.branching = list(_leaves(layers))
        self.length = 0
        self._points: dict[int, list[TreeCache | StateCache | None]] = {}

    def begin(self, rows: int, branches: Branches | None = None, certain: bool = False) -> None:
        """A pass of `rows` rows follows: consecutive tokens, or the rows of `branches`.

        certain  all of them will be kept
        """
        self.lineage = None
        if not certain and rows > 1:
            self.lineage = branches.lineage if branches else Lineage.chain(rows)
        for cache in self.branching:
            cache.begin(rows, self.lineage if isinstance(cache, StateCache) else branches)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows `path` of the last pass, in order."""
        for cache in self.branching:
            cache.commit(path)
        if self.quantization and not self.branching:
            self._quantize_stock()
        before, self.length = self.length, self.length + len(path)
        if before // BLOCK < self.length // BLOCK:
            mx.clear_cache()  # buffers of sizes that will not be needed again

    def _quantize_stock(self) -> None:
        how = self.quantization
        for place, cache in enumerate(self.layers):
            if type(cache) is KVCache and cache.offset >= how.start:
                self.layers[place] = cache.to_quantized(how.group_size, how.bits)

    def restart(self, rows: Sequence[int]) -> None:
        """Other texts begin in these rows of a batch: recurrent layers forget the old ones."""
        for cache in self.branching:
            if isinstance(cache, StateCache):
                cache.restart(rows)

    def begin_at(self, length: int) -> None:
        """All caches were filled from elsewhere and hold `length` tokens."""
        self.length = length
        for cache in self.branching:
            if isinstance(cache, StateCache):
                cache.begin_at(length)

    def restorable(self, length: int) -> int:
        """The longest text of at most `length` tokens that all layers can return to; -1: none."""
        while True:
            found = min((cache.restorable(length) for cache in self.branching), default=length)
            if found in (-1, length):
                return found
            length = found

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; False if a layer cannot.

        After False the caches are of no further use.
        """
        if length == self.length:
            return True
        self.length = length
        return all(cache.rewind(length) for cache in self.branching)

    @property
    def can_be_cut(self) -> bool:
        """Whether all layers can return to any position of the text."""
        return all(isinstance(c, TreeCache) and c.window is None for c in self.branching)

    def remember(self) -> None:
        """Keep what is needed to return to this position."""
        if not self.can_be_cut:
            point = self._points[self.length] = [cache.frozen() for cache in self.branching]
            device.finish([held.state for held in point if held is not None])

    def forkable(self, length: int) -> int:
        """The longest text of at most `length` tokens that `fork` can take; at least 0."""
        places = (place for place in self._points if place <= length)
        return max(self.restorable(length), *places, 0)

    def fork(self, length: int) -> LayerCaches:
        """The caches of another text that begins with the first `length` tokens of this one.

        length  as `forkable` returns it
        """
        if self.restorable(length) == length:
            made = iter([cache.fork(length) for cache in self.branching])
        else:
            held = zip(self._points[length], self.branching, strict=True)
            made = iter(
                [(cache if frozen is None else frozen).fork(length) for frozen, cache in held]
            )
        other = LayerCaches([_forked(cache, made) for cache in self.layers], self.quantization)
        other.length = length
        other._points = {at: point for at, point in self._points.items() if at <= length}
        return other

    @property
    def nbytes(self) -> int:
        """Memory of all layers, and of the remembered states and windows."""
        points = (held for point in self._points.values() for held in point if held is not None)
        return sum(cache.nbytes for cache in [*self.branching, *points])

    def takes(self, length: int, depth: int) -> bool:
        """Whether a tree after `length` tokens does not straddle the start of quantisation.

        depth  of the tree; if it does, rows decoded one by one would find part of it quantised
        """
        how = self.quantization
        return how is None or not length < how.start <= length + depth

    @property
    def growing(self) -> list[TreeCache]:
        """The caches that hold something of each token."""
        return [cache for cache in self.branching if isinstance(cache, TreeCache)]

    @property
    def state(self) -> list[Any]:
        """All arrays, for evaluation."""
        return [cache.state for cache in self.layers]


def _leaves(caches: Sequence[Any]) -> Iterator[TreeCache | StateCache]:
    for cache in caches:
        if isinstance(cache, CacheGroup):
            yield from _leaves(cache.members)
        elif isinstance(cache, TreeCache | StateCache):
            yield cache


def _forked(cache: Any, made: Iterator[TreeCache | StateCache]) -> Any:
    """The next of the forks `made`, or a group of the next ones, in place of a layer's cache."""
    if isinstance(cache, CacheGroup):
        return CacheGroup([_forked(member, made) for member in cache.members])
    return next(made)

"""Drafters that predict all depths at once, each without knowing the tokens of those before it.

Shape letters: P positions, R rows, W beam width, L beam length (the root included), D draft
vocabulary.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.drafters.beams import BeamDrafter, known_noise
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.tree import Candidates, Trie


@dataclass(frozen=True)
class Place:
    """R rows of drafts, all of `depth` tokens; origins (R,): from which of P positions each is."""

    origins: mx.array
    depth: int

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: mx.array) -> Place:
        return Place(self.origins[rows], self.depth)


class ParallelSteps:
    """Steps through what was predicted at once, whatever tokens are read on the way.

    predict  pending tokens (P,) -> (depths, P, ...) what the vocabulary makes logits of
    """

    def __init__(self, predict: Callable[[mx.array], mx.array]):
        self._predict, self._logits = predict, None

    def advance(self, state: Place | None, tokens: mx.array) -> Place:
        if state is None:
            self._predicted = self._predict(tokens)
            return Place(mx.arange(len(tokens)), 0)
        return Place(state.origins, state.depth + 1)

    def outputs(self, state: Place) -> mx.array:
        return self._predicted[state.depth][state.origins]

    def logits(self, depth: int, project: Callable[[mx.array], mx.array]) -> mx.array:
        """(P, D) what `project` makes of the outputs at a depth.

        For one position those of all depths are made at once: each product with a large output
        layer takes about as long. For many that would be no faster, and take much memory.
        """
        if self._predicted.shape[1] > 1:
            return project(self._predicted[depth])
        if self._logits is None:
            self._logits = project(self._predicted[:, 0])
        return self._logits[depth : depth + 1]


class ParallelDrafter(BeamDrafter):
    """Drafts the likeliest products of tokens at each depth.

    A beam search would find the same, except what its beams have no room for.
    """

    depths: int

    @abstractmethod
    def predict(
        self, begun: mx.array, memory: Sequence[mx.array], pending: mx.array, depths: int
    ) -> mx.array:
        """(depths, P, ...) what the vocabulary makes logits of, for what follows `pending` (P,)."""

    def steps(self, begun: mx.array, memory: Sequence[mx.array]) -> ParallelSteps:
        return ParallelSteps(partial(self.predict, begun, memory, depths=self.depths))

    def logits(self, steps: ParallelSteps, state: Place, rows: dict) -> mx.array:
        each = steps.logits(state.depth, lambda outputs: self.project(outputs, rows))
        return each[state.origins]

    def likeliest(
        self, width: int, length: int, coupled: bool,
        begun, root, position, key, temp, ids, rows, memory=(),
    ):  # fmt: skip
        """Tokens (L-1, W) and log-probabilities (L-1, W) of each depth."""
        depths = min(length - 1, self.depths)
        logits = self.project(self.predict(begun, memory, root, depths)[:, 0], rows)
        if coupled:
            logits = logits + known_noise(ids, key, temp, position, depths + 1)
        found, own = top_k(logits - device.logsumexp(logits), min(width, ids.size))
        return ids[found], own

    def candidates(self, root: int, *found: np.ndarray) -> Candidates:
        return product(root, *found)


def product(root: int, tokens: np.ndarray, logprobs: np.ndarray) -> Candidates:
    """The likeliest of all W + W^2 + ... + W^L prefixes: as many as a beam search would score.

    tokens, logprobs  (L, W) of each depth, in any order

    Best first: of the prefixes that are known, the likeliest gives way to its likelier two
    neighbours, the same with the next token at its last depth, and itself one token longer.

    Example: W = 2, L = 2, probabilities [0.6, 0.4] and [0.9, 0.1]: the prefixes 0, 00, 1, 10, 01
    and 11 in this order, of probabilities 0.6, 0.54, 0.4, 0.36, 0.06 and 0.04.
    """
    depths, width = tokens.shape
    order = np.argsort(-logprobs, axis=1, kind="stable")
    tokens = np.take_along_axis(tokens, order, axis=1).tolist()
    logprobs = np.take_along_axis(logprobs, order, axis=1).tolist()
    most = width + width * width * (depths - 1)
    trie = Trie(root)
    heap = [(-logprobs[0][0], 0, 0, 0)]  # what it costs, depth, rank there, node of its parent
    while heap and len(trie.tokens) <= most:
        cost, depth, rank, parent = heapq.heappop(heap)
        node = trie.add(parent, tokens[depth][rank], -cost)
        if rank + 1 < width:
            more = logprobs[depth][rank] - logprobs[depth][rank + 1]
            heapq.heappush(heap, (cost + more, depth, rank + 1, parent))
        if depth + 1 < depths:
            heapq.heappush(heap, (cost - logprobs[depth + 1][0], depth + 1, 0, node))
    return trie.candidates()

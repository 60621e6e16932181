"""Drafters that predict all depths at once, each without knowing the tokens of those before it.

Shape letters: W beam width, L beam length (the root included), D draft vocabulary, M candidates.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

import mlx.core as mx
import numpy as np

from redrafter_mlx import device
from redrafter_mlx.budget import Budget
from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.protocol import Unheeding
from redrafter_mlx.drafters.text import OwnVocabulary, TextVocabulary
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.round import Context
from redrafter_mlx.sampling import gumbel
from redrafter_mlx.tree import Candidates, TokenTree, Trie


class ParallelDrafter(Unheeding, ABC):
    """Drafts the likeliest products of tokens at each depth.

    vocabulary  the ids that can be proposed, and how they are scored
    depths      how many tokens it can predict
    experience  what its drafts were worth elsewhere, by temperature
    """

    def __init__(
        self,
        vocabulary: OwnVocabulary | TextVocabulary,
        depths: int,
        experience: dict[float, Experience] | None = None,
    ):
        self.vocabulary, self.depths, self.experience = vocabulary, depths, experience or {}

    @abstractmethod
    def outputs(self, context: Context, depths: int) -> mx.array:
        """(depths, ...) what the vocabulary makes logits of, for what follows the pending token."""

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        ids, rows = self.vocabulary.of(context.transcript)
        depths, width = min(budget.length - 1, self.depths), min(budget.width, ids.size)
        outputs = self.outputs(context, depths)
        logits = self.vocabulary.project(outputs, rows).astype(mx.float32)
        position = mx.array([context.position], dtype=mx.uint32)
        noise = context.noise
        if noise is not None and not noise.coupled:
            each = iter(logits)
            found = draw(
                lambda last: next(each)[None], ids, noise.key, noise.temp, position, width,
                depths + 1,
            )  # fmt: skip
            root, ids, *found = device.read(context.pending, ids, *found)
            return drawn_tree(int(root[0]), ids, *found, budget)
        if noise is not None:
            positions = position + mx.arange(1, depths + 1, dtype=mx.uint32)[:, None]
            known = gumbel(noise.key, positions, ids.astype(mx.uint32)[None], mx)
            logits = logits + noise.temp * known
        likeliest, own = top_k(logits - device.softmax(logits)[0], width)
        root, tokens, logprobs = device.read(context.pending, ids[likeliest], own)
        return budget.tree(product(int(root[0]), tokens, logprobs))


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

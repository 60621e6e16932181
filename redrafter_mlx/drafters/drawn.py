"""Drafts drawn from a drafter's distributions, without replacement: what `rejection` verifies.

Shape letters: D draft vocabulary, W beam width, L beam length.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.sampling import gumbel
from redrafter_mlx.rounds.tree import Candidates, DrawnTree, TokenTree


def draw(
    logits: Callable[[mx.array | None], mx.array],
    ids: mx.array,
    key: mx.array,
    temp: mx.array,
    position: mx.array,
    width: int,
    length: int,
) -> tuple[mx.array, mx.array]:
    """W tokens at each of L-1 depths, each depth following the first token of every depth before.

    logits    the last drawn token (1,), None at first -> logits (1, D) of what follows
    ids       (D,) token ids
    key, temp of the noise that draws: adding Gumbel noise and taking the W highest in turn is
              drawing W without replacement (Kool et al., arXiv 1903.06059)
    position  (1,) uint32 of the pending token

    Returns, on the device, tokens (L-1, W) in the order they were drawn, and the log-probabilities
    (L-1, D) they were drawn from.
    """
    tokens, logprobs, last = [], [], None
    for depth in range(1, length):
        scaled = logits(last) / temp
        logprobs.append(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True))
        noise = gumbel(key, (position + depth)[:, None], ids.astype(mx.uint32)[None], mx)
        drawn = ids[mx.argsort(-(logprobs[-1] + noise), axis=-1)[0, :width]]
        tokens.append(drawn)
        last = drawn[:1]
    return mx.stack(tokens), mx.concatenate(logprobs)


def drawn_tree(
    root: int, ids: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, budget: Budget
) -> DrawnTree:
    """The tree of what `draw` returned, as large as the budget allows.

    The budget is shown odds that depend on the places of the nodes only, and at each depth the
    tokens that were drawn first are kept, as many as it chose. If it chose by what was drawn, or
    left out a token after which others were drawn, the rest would no longer be random draws.
    """
    depths, width = tokens.shape
    rank, depth = np.meshgrid(np.arange(width), np.arange(depths))
    odds = np.log(0.5) * (1 + depth + rank)

    def candidates(kept: np.ndarray) -> Candidates:
        place = np.cumsum(kept).reshape(kept.shape) - 1
        before = np.append(-1, place[:-1, 0])[depth]
        spine = place[-1, :1] if kept[-1, 0] else np.zeros(0, int)
        return Candidates(root, tokens[kept], before[kept], odds[kept], beams=spine)

    chosen = budget.tree(candidates(np.ones(tokens.shape, bool)))
    sizes = np.bincount(chosen.depths, minlength=depths + 1)[1 : depths + 1]
    c = candidates(rank < sizes[:, None])
    tree = TokenTree.best(root, c.tokens, c.parents, c.logprobs, len(chosen))
    has_children = np.isin(np.arange(len(tree)), tree.parents)
    return DrawnTree(
        tree.tokens,
        tree.parents,
        tree.logprobs,
        ids=ids,
        probs=np.exp(logprobs, dtype=np.float64),
        sources=np.where(has_children, tree.depths, -1),
    )

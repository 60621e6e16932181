"""Rules: which path of a verified tree stands, and what comes after it."""

from __future__ import annotations

import mlx.core as mx

from redrafter_mlx import device
from redrafter_mlx.round import Context, Outcome, Verdict
from redrafter_mlx.sampling import Sampler
from redrafter_mlx.tree import TokenTree


class Match:
    """The lossless rule: what the target would say anyway is kept.

    At each visited node the sampler chooses the next token from the target's logits, exactly as
    plain decoding would at that position. If a child carries it the walk descends, else it is the
    next pending token. The tree decides how many tokens a round yields, never which.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        prepared = self.sampler.prepare(outcome.logits)
        if len(tree) == 1 and self.sampler.is_argmax:  # one path, nothing to compare: do not wait
            mx.async_eval(prepared)
            return Verdict([0], prepared, token=None)
        (rows,) = device.read(prepared)
        history = list(context.transcript.tokens)
        path = [0]
        while True:
            token = self.sampler.choose(rows[path[-1]], context.position + len(path), history)
            child = tree.children[path[-1]].get(token)
            if child is None:
                return Verdict(path, mx.array([token], dtype=context.pending.dtype), token)
            path.append(child)
            history.append(token)
